"""Templates, and rows in tokens: training sees exactly the prompt that generation starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from fedalt.config.data import DataConfig
from fedalt.data.encode import AnswerEncoder, encode_federation, get_template
from fedalt.data.federation import ClientData, Federation, Row
from fedalt.errors import UserError
from micro import (
    CLIENTS,
    TEST,
    TRAIN,
    data_folder,
    model_folder,
    refused,
    rows,
    run_here,
    settings,
    tokenizer,
    write_rows,
    write_yaml,
)
from micro import events as events_of

EOS_ID = 1
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def one_client(*train: Row, test: tuple[Row, ...] = ()) -> Federation:
    return Federation({5: ClientData(train, (), test)}, "here")


def by(config: DataConfig) -> tuple[AnswerEncoder, DataConfig]:
    return AnswerEncoder(tokenizer(), config.template, config.cutoff), config


def with_special_tokens(template: str) -> Any:
    """The micro tokenizer with a post-processor, as Llama (``<s> $A``) and T5 (``$A </s>``) have one."""
    made = tokenizer()
    tokens = [("<pad>", 0), ("</s>", 1)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return made


# ------------------------------------------------------------------------------------------------------------ templates


def test_alpaca_short_is_the_official_codes_text() -> None:
    assert get_template("alpaca_short", None)("Do it.") == "### Instruction:\nDo it.\n\n### Response:\n"


def test_alpaca_is_alpacas_text() -> None:
    assert get_template("alpaca", None)("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )


def test_chat_is_the_tokenizers_own_template() -> None:
    own = tokenizer()
    own.chat_template = CHAT
    assert get_template("chat", own)("Do {it}.") == "<user>Do {it}.\n<assistant>"


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.template: chat, but this tokenizer has no chat template"):
        get_template("chat", tokenizer())


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Frage: {instruction}\nAntwort für {you}: ", encoding="utf-8")
    assert get_template(str(path), None)("{x} \\1 %s") == "Frage: {x} \\1 %s\nAntwort für {you}: "


def test_a_file_without_a_place_for_the_instruction_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Question: {question}\n")
    with pytest.raises(UserError, match=r"mine\.txt does not hold \{instruction\}"):
        get_template(str(path), None)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xff{instruction}")
    with pytest.raises(UserError, match=r"mine\.txt"):
        get_template(str(path), None)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        get_template("alpaca_shor", None)
    for piece in ('"alpaca_shor" is no template', 'did you mean "alpaca_short"?', "alpaca", "chat"):
        assert piece in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- examples


def test_prompt_and_answer_ids() -> None:
    own = tokenizer()
    example = AnswerEncoder(own, "alpaca_short", 64).example(Row("Say 1 2.", "1 2"))
    assert example is not None
    prompt = "### Instruction:\nSay 1 2.\n\n### Response:\n"
    assert list(example.prompt) == own(prompt)["input_ids"]
    assert list(example.answer) == [*own("1 2")["input_ids"], EOS_ID]
    assert own.decode(example.prompt) == prompt
    assert len(example) == len(example.prompt) + len(example.answer)


def test_the_answer_is_cut_at_the_cutoff_and_ends_only_where_there_is_room() -> None:
    own = tokenizer()
    row = Row("Say 1 2.", "1 2 3 4 5 6")
    whole = AnswerEncoder(own, "alpaca_short", 512).example(row)
    assert whole is not None
    room = len(whole) - len(whole.prompt)
    for missing in range(room):
        cut = AnswerEncoder(own, "alpaca_short", len(whole) - missing).example(row)
        assert cut is not None
        assert cut.prompt == whole.prompt
        assert cut.answer == whole.answer[: room - missing]
        assert (EOS_ID in cut.answer) == (missing == 0)
    assert AnswerEncoder(own, "alpaca_short", len(whole.prompt)).example(row) is None
    assert AnswerEncoder(own, "alpaca_short", len(whole.prompt) - 1).example(row) is None


@pytest.mark.parametrize("special", ["</s> $A", "$A </s>", "<pad> $A </s>"])
def test_a_tokenizers_special_tokens_frame_the_prompt_but_never_end_it(special: str) -> None:
    own = with_special_tokens(special)
    plain = tokenizer()("### Instruction:\nSay 1.\n\n### Response:\n")["input_ids"]
    example = AnswerEncoder(own, "alpaca_short", 64).example(Row("Say 1.", "1"))
    assert example is not None
    before = {"</s> $A": [1], "$A </s>": [], "<pad> $A </s>": [0]}[special]
    assert list(example.prompt) == [*before, *plain]
    assert list(example.answer) == [*tokenizer()("1")["input_ids"], EOS_ID]


def test_a_chat_template_writes_its_own_special_tokens() -> None:
    own = with_special_tokens("</s> $A")
    own.chat_template = CHAT
    example = AnswerEncoder(own, "chat", 64).example(Row("Say 1.", "1"))
    assert example is not None
    assert EOS_ID not in example.prompt
    assert own.decode(example.prompt) == "<user>Say 1.\n<assistant>"


@pytest.mark.parametrize("template", ["alpaca_short", "alpaca", "chat"])
def test_the_training_prompt_is_the_prompt_of_generation(template: str) -> None:
    """The first answer token may not merge into the prompt: "7 4" after a newline is tokenised on its own."""
    own = with_special_tokens("</s> $A")
    own.chat_template = CHAT
    encoder = AnswerEncoder(own, template, 512)
    for row in rows(0, 20):
        example = encoder.example(Row(**row))
        assert example is not None
        assert example.prompt == encoder.prompt(row["instruction"])


# ------------------------------------------------------------------------------------------------------ what is skipped


def test_rows_whose_prompt_fills_the_cutoff_are_skipped_and_counted() -> None:
    short, long = Row("Say 1.", "1"), Row("Say " + "1 " * 200, "1")
    federation = one_client(short, long, short, test=(long, short))
    (mine,) = encode_federation(federation, *by(DataConfig(cutoff=64))).values()
    assert [example.row for example in mine.train] == [short, short]
    assert [example.row for example in mine.test] == [short]
    assert mine.skipped == {"train": 1, "validation": 0, "test": 1}


def test_a_client_with_nothing_left_to_learn_is_named() -> None:
    long = Row("Say " + "1 " * 200, "1")
    with pytest.raises(UserError, match=r"^client 5: all 2 train rows have a prompt of 64 tokens or more"):
        encode_federation(one_client(long, long), *by(DataConfig(cutoff=64)))


def test_skipped_rows_are_reported_as_notes(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    long = {**rows(1, 1)[0], "instruction": "x " * 300}
    write_rows(folder / "train" / "local_training_1.json", [*rows(1, TRAIN), long, long], lines=False)
    write_rows(folder / "test" / "local_testing_1.jsonl", [long, *rows(1, TEST)], lines=True)
    run, _ = run_here(settings(tmp_path / "run", data=folder, federation__rounds=1))
    notes = [event["text"] for event in events_of(run.path) if event["event"] == "note"]
    assert notes[1:] == ["client 1: 2 train, 1 test rows skipped, their prompt fills data.cutoff=64"]
    clients = [event for event in events_of(run.path) if event["event"] == "client"]
    assert len({event["steps"] for event in clients}) == 1, "the long rows took no step"
    assert len(clients) == CLIENTS


def test_a_client_whose_prompts_all_fill_the_cutoff_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    long = {**rows(1, 1)[0], "instruction": "x " * 300}
    write_rows(folder / "train" / "local_training_1.json", [long, long], lines=False)
    config = write_yaml(tmp_path / "run.yaml", settings(tmp_path / "run", data=folder))
    line = refused("run", config)
    assert line.startswith("client 1: all 2 train rows")
    assert "data.cutoff" in line
    assert not (tmp_path / "run").exists()


def test_a_client_that_could_never_be_scored_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "rows")
    long = {**rows(1, 1)[0], "instruction": "x " * 300}
    write_rows(folder / "test" / "local_testing_1.jsonl", [long], lines=True)
    config = write_yaml(tmp_path / "run.yaml", settings(tmp_path / "run", data=folder))
    line = refused("run", config)
    assert line.startswith("client 1: ")
    assert "test" in line
    assert not (tmp_path / "run").exists()


def test_chat_template_through_a_whole_run(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    own = tokenizer()
    own.chat_template = CHAT
    own.save_pretrained(model)
    values = settings(tmp_path / "run", model=model, federation__rounds=1, data__template="chat")
    run, _ = run_here(values)
    assert run.final_scores.is_file()
