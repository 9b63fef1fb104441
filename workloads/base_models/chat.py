"""The chat template of models that bring none (ChatML), with the model's own end token, by which it stops."""


def chatml(end: str) -> str:
    """A Jinja template; every message ends with the token `end`."""
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
        "{% if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}"
        f"{{{{ '{end}\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
