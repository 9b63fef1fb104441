"""The main job against a running studio, over REST only, with progress."""

import time
from typing import Any

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mini_studio.examples import PORT_MAREN, QUESTION, hyperparameters

READY_S = 600.0
"""Longest wait for a deployment; the first one of a base model downloads it."""


class DemoFailed(Exception):
    """The studio said no; the message is its own."""


class Demo:
    """One run of the main job."""

    def __init__(self, url: str, model: str, client_code: str, console: Console) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._model = model
        self._client_code = client_code
        self._console = console

    def run(self) -> None:
        """Ask, upload, fine-tune, deploy, ask again."""
        self._call("POST", "/inference/deploy/base", json={"client_code": self._client_code, "model_id": self._model})
        before = self._ask(f"deploying {self._model}", self._model)
        dataset = self._upload()
        job = self._fine_tune(dataset)
        self._console.print(f"fine-tuned: loss {job['progress']['train_loss']:.3f}, {job['fine_tuned_weights_path']}")
        deployed = self._call(
            "POST",
            "/inference/deploy/fine_tuned",
            json={
                "client_code": self._client_code,
                "base_model": self._model,
                "fine_tuned_weights_path": job["fine_tuned_weights_path"],
            },
        )
        after = self._ask(f"deploying {deployed['deployment']}", job["fine_tuned_model"])
        self._console.print(
            Panel(f"[bold]{QUESTION}[/]\n\nbefore: {before}\nafter:  [green]{after}[/]", title="the same question")
        )

    def _upload(self) -> str:
        with PORT_MAREN.open("rb") as file:
            answer = self._call("POST", f"/fine_tuning/upload-dataset/{self._client_code}", files={"file": file})
        self._console.print(f"uploaded {PORT_MAREN.name}: {answer['rows']} rows, {answer['dataset_id']}")
        return str(answer["dataset_id"])

    def _fine_tune(self, dataset: str) -> dict[str, Any]:
        body = {"model": self._model, "client_code": self._client_code, "dataset_filename": dataset}
        body |= hyperparameters(self._model)
        job = self._call("POST", "/fine_tuning/submit-finetune", json=body)["job"]
        with bar(self._console) as progress:
            task = progress.add_task("fine-tuning", total=None)
            while job["status"] not in ("succeeded", "failed", "cancelled"):
                time.sleep(0.5)
                job = self._call("GET", f"/fine_tuning/jobs/{job['id']}")["job"]
                seen = job["progress"]
                loss = f", loss {seen['train_loss']:.3f}" if seen["train_loss"] is not None else ""
                what = seen["message"] or f"{job['status']}{loss}"
                progress.update(task, total=seen["total_steps"], completed=seen["step"] or 0, description=what)
        if job["status"] == "failed":
            raise DemoFailed(job["error"]["message"])
        return dict(job)

    def _ask(self, what: str, model: str) -> str:
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
        deadline = time.monotonic() + READY_S
        with bar(self._console) as progress:
            task = progress.add_task(what, total=None)
            while True:
                headers = {"X-User-ID": self._client_code}
                response = self._http.post(f"/inference/infer/{model}", json=body, headers=headers)
                waits = response.status_code in (404, 503) and time.monotonic() < deadline
                if not waits or response.json().get("code") == "deployment_failed":
                    break
                time.sleep(0.5)
            progress.update(task, total=1, completed=1)
        if response.status_code != 200:
            raise DemoFailed(response.json().get("error", response.text))
        return str(response.json()["choices"][0]["message"]["content"])

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._http.request(method, path, **options)
        answer = response.json()
        if response.status_code >= 400:
            raise DemoFailed(f"{method} {path}: {answer.get('error', response.text)}")
        return dict(answer)


def bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run(url: str, model: str, client_code: str) -> int:
    """The exit code: 0 when the fine-tuned model answered."""
    console = Console()
    try:
        Demo(url, model, client_code, console).run()
    except DemoFailed as error:
        console.print(f"[red]{error}[/]")
        return 1
    except httpx.HTTPError as error:
        console.print(f"[red]no studio answers at {url} ({error}); start one with `make run`[/]")
        return 1
    return 0
