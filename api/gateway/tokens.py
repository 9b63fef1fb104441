"""How many tokens a request used, as the model server says at the end of its answer, in JSON and in a stream alike."""

import re

END_BYTES = 2048
"""How much of an answer's end is kept. `usage` follows the choices in all of OpenAI's shapes."""
_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,12})[\s,}]')
_COMPLETION = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})[\s,}]')
_OBJECT = re.compile(rb'"usage"\s*:\s*\{')


def reported(end: bytes) -> tuple[int | None, int | None]:
    """Prompt and completion tokens in the last usage object of an answer's end. Both are below `events.usage.MAX_TOKENS`."""
    at = end.rfind(b'"usage"')
    while at >= 0:
        if _OBJECT.match(end, at):
            prompt, completion = _PROMPT.search(end, at), _COMPLETION.search(end, at)
            return prompt and int(prompt[1]), completion and int(completion[1])
        at = end.rfind(b'"usage"', 0, at)
    return None, None
