"""Rows in tokens beyond an instruction and its answer: inputs, conversations, ends of answers, and the boundary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedalt.config.data import DataConfig
from fedalt.data.batches import collate
from fedalt.data.encode import AnswerEncoder, Example, encode_client, left_out, token_texts
from fedalt.data.federation import ClientData, Row
from fedalt.errors import UserError
from fedalt.evaluation.choices import _answers
from micro import EOS, call, model_folder, settings, tokenizer, write_yaml

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (  # as DeepSeek-R1's: the prompt opens a thought that earlier answers do not have
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}x"
TALK = Row(
    "flat",
    "6",
    turns=(("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?")),
)


def encoder(template: str = "alpaca_short", own: Any = None, cutoff: int = 512, **config: Any) -> AnswerEncoder:
    return AnswerEncoder(own or tokenizer(), template, cutoff, DataConfig(template=template, **config))


def chatting(template: str) -> Any:
    own = tokenizer()
    own.chat_template = template
    return own


def example(made: AnswerEncoder, row: Row) -> Example:
    found = made.example(row)
    assert found is not None
    return found


def parts(made: AnswerEncoder, row: Row) -> tuple[str, str]:
    """The whole row as text, and what of it is trained, with a bar where something between is not."""
    found = example(made, row)
    texts = token_texts(made.tokenizer, (*found.prompt, *found.answer))
    trained, last = "", -1
    for place, _ in found.supervised:
        trained += ("|" if place != last + 1 and trained else "") + texts[place]
        last = place
    return "".join(texts), trained


# --------------------------------------------------------------------------------------------------------------- inputs

WITH_INPUT = Row("Add.\n\n### Input:\n2 3", "5", input="2 3")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("alpaca_short", "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"),
        (
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n",
        ),
        ("Q: {instruction} A: ", "Q: Add.\n\n### Input:\n2 3 A: "),
        ("Q: {instruction} ({input}) A: ", "Q: Add. (2 3) A: "),
    ],
    ids=["alpaca_short", "alpaca", "a file", "a file with a place for the input"],
)
def test_an_input_joins_in_alpacas_way(tmp_path: Path, template: str, text: str) -> None:
    if "{" in template:
        (tmp_path / "mine.txt").write_text(template, encoding="utf-8-sig")
        template = str(tmp_path / "mine.txt")
    assert parts(encoder(template), WITH_INPUT)[0] == f"{text}5{EOS}"


def test_an_input_in_a_chat_follows_in_a_line_of_its_own() -> None:
    assert parts(encoder("chat", chatting(CHATML)), WITH_INPUT)[0] == f"<|user|>Add.\n2 3{EOS}\n<|assistant|>5{EOS}"


# -------------------------------------------------------------------------------------------------------- conversations


def test_all_answers_are_trained_in_the_plain_layout() -> None:
    whole, trained = parts(encoder(), TALK)
    assert trained == f"4{EOS}|6{EOS}"
    assert whole == (
        f"Be brief.\n\n### Instruction:\n2+2?\n\n### Response:\n4{EOS}\n\n"
        f"### Instruction:\nAnd 3+3?\n\n### Response:\n6{EOS}"
    )


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_all_answers_are_trained_in_the_chat_template(template: str) -> None:
    own = chatting(template)
    whole, trained = parts(encoder("chat", own), TALK)
    assert trained == f"4{EOS}|6{EOS}"
    said = [{"role": role, "content": text} for role, text in TALK.turns]
    prompt = own.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert whole == f"{prompt}6{EOS}"
    ids = own(prompt, add_special_tokens=False)["input_ids"]
    assert list(example(encoder("chat", own), TALK).prompt) == ids, "the prompt is Hugging Face's own"


def test_a_template_that_refuses_is_one_line() -> None:
    with pytest.raises(UserError, match="refuses turns of system, user, assistant, user: no system, please"):
        encoder("chat", chatting(STRICT)).example(TALK)


def test_a_single_turn_is_like_an_instruction() -> None:
    made, row = encoder(), Row("2+2?", "4")
    talk = Row("2+2?", "4", turns=(("user", "2+2?"),))
    one, other = example(made, row), example(made, talk)
    assert (one.prompt, one.answer, one.spans) == (other.prompt, other.answer, other.spans)


def test_every_trained_token_is_a_target_of_the_batch() -> None:
    made = encoder()
    talk, plain = example(made, TALK), example(made, Row("2+2?", "4"))
    batch = collate([[plain, talk]])
    assert batch.target.tolist() == [*plain.answer, *(token for _, token in talk.supervised)]
    for place, token in zip(batch.place.tolist(), batch.target.tolist(), strict=True):
        assert batch.inputs[place + 1] == token


def test_messages_train_and_answer_to_the_end(tmp_path: Path) -> None:
    """With a chat template: the run's own settings say chat, and typed prompts go through it, too."""
    model = model_folder(tmp_path / "model")
    own = chatting(CHATML)
    own.save_pretrained(model)
    rows = [
        {"messages": [{"role": r, "content": t} for r, t in (*TALK.turns, ("assistant", f"{i % 3}"))], "id": i}
        for i in range(24)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    values = settings(tmp_path / "run", model, tmp_path / "talks.json", data__clients=2, federation__rounds=1)
    values["data"]["cutoff"] = 128
    done = call("run", write_yaml(tmp_path / "run.yaml", values))
    assert done.code == 0, done.err
    assert "conversations: data.template=chat" in done.err + done.out
    assert "template: chat" in (tmp_path / "run/config.yaml").read_text()
    assert call("generate", tmp_path / "run", "--client", 0, "2+2?").code == 0
    assert "equal to the run's own scores" in call("evaluate", tmp_path / "run").out
    shown = call("data", "show", tmp_path / "run/config.yaml", "--json").json
    assert shown["template"] == "chat" and sum(shown["rows"][0]["trained"]) == 4


# -------------------------------------------------------------------------------------------------------- ends and cuts


@pytest.mark.parametrize("written", ["yes</s>", "yes </s>\n", "yes</s></s>"])
def test_an_end_that_is_written_out_is_taken_off(written: str) -> None:
    made = encoder()
    found = example(made, Row("a", written))
    assert found.row.output == "yes"
    assert (found.prompt, found.answer) == (
        example(made, Row("a", "yes")).prompt,
        example(made, Row("a", "yes")).answer,
    )
    mine = encode_client(made, ClientData((Row("a", written), Row("a", "no")), (), (Row("a", written),)))
    assert "an end-of-sequence text is taken off the answers of 1 train, 1 test rows" in left_out({0: mine}, 9)[0]
    assert example(made, Row("a", "</s>")).row.output == "</s>"


def test_what_is_cut_is_counted() -> None:
    made = encoder(cutoff=40)
    mine = encode_client(made, ClientData((Row("a", "yes " * 40), Row("a", "no")), (), (Row("a" * 400, "no"),)))
    assert left_out({7: mine}, 40) == (
        "client 7: 1 test rows skipped, their prompt fills data.cutoff=40",
        "cut at data.cutoff=40 tokens: 1 train rows",
    )


# ------------------------------------------------------------------------------------------------------------- boundary


def llama_2() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a blank before every text, bytes for newlines, ``<s>`` in front."""
    words = ["yes", "no", "##", "###"]
    pieces = [*"abcdefghijklmnopqrstuvwxyzIR#:?.", "▁", "<0x0A>"]
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("▁", "yes"), ("▁", "no"), ("#", "#"), ("##", "#")]
    made = ["ye", *words, "▁yes", "▁no"]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces, *made])}
    bare = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bare.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(("boundary", "first"), [("apart", "▁yes"), ("joint", "yes")])
def test_the_first_token_that_llama_2_trains(boundary: str, first: str) -> None:
    own = llama_2()
    made = encoder(own=own, boundary=boundary)
    row = Row("is it?\nOPTIONS:\n- yes\n- no", "yes")
    found = example(made, row)
    assert own.convert_ids_to_tokens(list(found.answer)) == [first, "</s>"]
    text = made.template(row.instruction)
    assert list(found.prompt) == own(text)["input_ids"]
    if boundary == "joint":  # the official code's labels: the whole text, masked as far as the prompt alone goes
        whole = own(text + row.output)["input_ids"]
        assert [*found.prompt, *found.answer[:-1]] == whole
    assert _answers(own, found, None)["yes"] == found.answer, "options are tokenised as answers are"


def test_a_token_across_the_boundary_leaves_the_row_apart(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("{instruction} ye")
    own = llama_2()
    joint, apart = (encoder(str(tmp_path / "t.txt"), own, boundary=b) for b in ("joint", "apart"))
    row = Row("a", "s")
    assert example(joint, row).answer == example(apart, row).answer
    assert own.convert_ids_to_tokens(list(example(joint, row).answer)) == ["▁", "s", "</s>"]


def test_byte_level_tokenizers_hardly_care() -> None:
    row = Row("Is 3 more than 2?", "yes")
    one, other = (example(encoder(boundary=b), row) for b in ("apart", "joint"))
    assert (one.prompt, one.answer) == (other.prompt, other.answer)


def test_every_answer_of_a_conversation_is_joint() -> None:
    own = llama_2()
    row = Row("flat", "no", turns=(("user", "a?"), ("assistant", "yes"), ("user", "b?")))
    found = example(encoder(own=own, boundary="joint"), row)
    trained = own.convert_ids_to_tokens([token for _, token in found.supervised])
    assert trained == ["yes", "</s>", "no", "</s>"]
