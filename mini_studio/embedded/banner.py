"""What `make run` prints when the studio is healthy."""

import json
import shlex
from pathlib import Path

from mini_studio.examples import MODEL, PORT_MAREN, QUESTION, hyperparameters

CLIENT = "acme"


def _field(*path: str) -> str:
    """A shell filter from a JSON answer to one of its fields; what a refusal says goes to the terminal."""
    keys = "".join(f'["{key}"]' for key in path)
    program = f'import sys,json; t=sys.stdin.read(); d=json.loads(t); print(d{keys}) if d.get("ok") else sys.exit(t)'
    return f"python3 -c '{program}'"


def banner_lines(url: str) -> list[str]:
    """The main job in four shell lines: upload, fine-tune, wait and deploy, ask. They need curl and python3 alone."""
    parameters = json.dumps(hyperparameters(MODEL), separators=(",", ":"))[1:-1]
    is_json = "-H 'Content-Type: application/json'"
    file = shlex.quote(f"file=@{PORT_MAREN}")
    submit = f'{{"client_code":"{CLIENT}","model":"{MODEL}","dataset_filename":"\'"$DATASET"\'",{parameters}}}'
    deploy = f'{{"client_code":"{CLIENT}","base_model":"{MODEL}","fine_tuned_weights_path":"\'"$WEIGHTS"\'"}}'
    ask = f'{{"messages":[{{"role":"user","content":"{QUESTION}"}}],"max_tokens":32,"temperature":0}}'
    job = f'curl -sS "{url}/fine_tuning/jobs/$JOB"'
    dataset_id, job_id = _field("dataset_id"), _field("job", "id")
    status, weights = _field("job", "status"), _field("job", "fine_tuned_weights_path")
    ended = 'case "$STATUS" in succeeded|failed) break;; esac'
    return [
        f'DATASET=$(curl -sS {url}/fine_tuning/upload-dataset/{CLIENT} -F {file} | {dataset_id}); echo "$DATASET"',
        f"JOB=$(curl -sS {url}/fine_tuning/submit-finetune {is_json} -d '{submit}' | {job_id}); echo \"$JOB\"",
        f'while STATUS=$({job} | {status}); do echo "$STATUS"; {ended}; sleep 3; done; '
        f'if [ "$STATUS" = succeeded ]; then WEIGHTS=$({job} | {weights}); '
        f"curl -sS {url}/inference/deploy/fine_tuned {is_json} -d '{deploy}'; else {job}; fi; echo",
        # -f keeps the answers while the model is starting (503) off the screen
        f"curl -sSf --retry 60 --retry-delay 1 {url}/inference/infer/{MODEL} -H 'X-User-ID: {CLIENT}' {is_json} -d '{ask}'; echo",
    ]


def banner(url: str, data: Path, seconds: float) -> str:
    """The text between two rules."""
    rule = "-" * 78
    head = [
        f"Mini Studio is running at {url}   (API documentation: {url}/docs)",
        f"data: {data}",
        f"logs: {data / 'logs'}",
        f"healthy after {seconds:.1f} s; Ctrl-C stops it",
        "",
        "Fine-tune a model, deploy it and ask it - paste into another terminal:",
        "",
    ]
    return "\n".join([rule, *head, "\n\n".join(banner_lines(url)), rule])
