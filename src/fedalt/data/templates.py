"""From an instruction to a prompt: the paper's template, Alpaca's, the tokenizer's own, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fedalt.errors import UserError, did_you_mean

TEMPLATES = {
    "alpaca_short": "### Instruction:\n{instruction}\n\n### Response:\n",
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
}
CHAT = "chat"
_PLACE = "{instruction}"


class Template(Protocol):
    """Turns an instruction into the text that the answer follows."""

    def __call__(self, instruction: str) -> str:
        """The prompt."""
        ...


def get_template(name: str, tokenizer: Any) -> Template:
    """A template by name, the tokenizer's chat template, or the text of a file that holds ``{instruction}``.

    Raises:
        UserError: Unknown name and no such file, a file without the place holder, a tokenizer without a chat template.
    """
    text = template_text(name)
    return _chat(tokenizer) if text is None else lambda instruction: text.replace(_PLACE, instruction)


def template_text(name: str) -> str | None:
    """The text of a template with ``{instruction}`` in it; nothing for the tokenizer's chat template.

    Raises:
        UserError: Unknown name and no such file, or a file without the place holder.
    """
    return None if name == CHAT else TEMPLATES.get(name) or _read(name)


def _chat(tokenizer: Any) -> Template:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("data.template: chat, but this tokenizer has no chat template; use alpaca_short or a file")

    def render(instruction: str) -> str:
        turn = [{"role": "user", "content": instruction}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    return render


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        known = [*TEMPLATES, CHAT]
        raise UserError(
            f'data.template: "{name}" is no template{did_you_mean(name, known)} and no file; known: {known}'
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.template: {name} is not UTF-8 text (byte {error.start})") from None
    if _PLACE not in text:
        raise UserError(f"data.template: {name} does not hold {_PLACE}, the place where the instruction goes")
    return text
