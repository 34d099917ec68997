"""Settings of rows: where they come from, who gets which, and how they become prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from fedalt.config.section import Named, Section
from fedalt.registry import PARTITIONERS, registered_name


class PartitionConfig(Section):
    """Who gets which rows, where a source has no clients of its own or they are to be dealt anew."""

    by: registered_name(PARTITIONERS) | None = Field(  # type: ignore[valid-type]
        None,
        description="how rows are dealt: iid, dirichlet, pathological, column, quantity, gl_dir, sc_dir, or "
        "FILE.py:Name; iid for rows without clients when not given, clients as they are for others",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="Dirichlet's concentration, small is uneven; .5 (dirichlet, quantity), .3 (gl_dir), 3 (sc_dir)",
    )
    classes_per_client: int = Field(2, ge=1, description="pathological: labels of each client")
    column: str | None = Field(
        None,
        description="what rows are dealt by: label, task, category or a column of the source; label if not given, task "
        "where clients' rows are dealt anew",
    )
    superclasses_per_client: int | None = Field(
        None, ge=1, description="sc_dir: categories of each client; 1 or 2, drawn, when not given"
    )
    dir_level: Literal["superclass", "class_in_superclass"] = Field(
        "class_in_superclass", description="sc_dir: what is shared by one draw, a category or each label within it"
    )
    min_rows: int = Field(10, ge=1, description="training rows that every client gets, or the settings are refused")
    test: Literal["like_train", "shared"] = Field(
        "like_train", description="test and validation rows: dealt in the shares of training rows, or all for everybody"
    )
    seed: int | None = Field(None, ge=0, description="seed of the deal; the run's when not given")
    file: str | None = Field(
        None, description="a partition.json whose clients get the same rows again; its held-out clients stay out"
    )


def text_keys(value: Any) -> Any:
    """The keys as text: YAML reads ``0: negative`` as a number."""
    return {str(key): name for key, name in value.items()} if isinstance(value, dict) else value


class TinyworldConfig(Section):
    """The federation that ships with fedalt."""

    seed: int = Field(0, ge=0, description="seed of the generated world's rows")
    clash: float = Field(0.5, ge=0, le=1, description="how much the clients' answer conventions conflict, 0 to 1")


class DataConfig(Named):
    """Whose rows, and how they become prompts."""

    source: str = Field(
        "tinyworld",
        description="tinyworld, or a folder with train/local_training_{i}.json or a file per client; or rows to deal "
        "to clients: digits, a CSV, TSV, JSON or Parquet file, a folder with train.csv and test.csv, of images by "
        "class, a Hugging Face data set, or FILE.py:Name",
    )
    files: Literal["clients", "splits", "pool"] | None = Field(
        None,
        description="what the files of a folder are: a client each, the splits train, validation and test, or rows "
        "that are put together to be dealt; what their names say when not given",
    )
    config: str | None = Field(None, description="configuration of a Hugging Face data set, for example sst2 of glue")
    text_columns: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="columns of the text, joined by newlines, or of a conversation; the usual ones when not given",
    )
    label_column: str | None = Field(None, description="column of the label; output, label or so when not given")
    columns: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of the columns of a CSV or TSV file that has no header line"
    )
    label_names: Annotated[dict[str, str], BeforeValidator(text_keys)] | None = Field(
        None, description="label → what it is called, for example {0: negative, 1: positive}"
    )
    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="use only the clients with these tasks, counted anew from 0"
    )
    clients: int | None = Field(
        None,
        ge=1,
        description="use the first N clients; all when not given. tinyworld makes as many as asked for; a multiple "
        "of a folder's clients splits the rows of each over several; others are dealt to N",
    )
    held_out: int = Field(0, ge=0, description="the last N clients take no part in the run; they can join afterwards")
    partition: PartitionConfig = PartitionConfig()
    test_share: float = Field(
        0.2, gt=0, lt=1, description="share of each client's rows that are test rows where the source has none"
    )
    split_rows: bool = Field(
        False, description="tinyworld splits its eight clients' rows over more, as a folder does, and makes no new ones"
    )
    tasks_per_client: int = Field(
        1, ge=1, description="clients whose rows each client holds equal shares of: its own and its neighbours'"
    )
    template: str = Field(
        "alpaca_short", description="alpaca_short (paper code), alpaca, chat, a file, or FILE.py:Name"
    )
    boundary: Literal["apart", "joint"] = Field(
        "apart",
        description="prompt and answer are tokenised apart, so that training sees the prompt of generation; or "
        "together, as the paper's code does",
    )
    cutoff: int = Field(512, ge=8, description="longest row in tokens (paper code: 512)")
    validation_rows: int = Field(
        0, ge=0, description="rows per client held out of training where the source has no validation rows"
    )
    shuffle: bool = Field(
        False, description="shuffle each client's rows before limits, for files that are sorted; seeded as the deal is"
    )
    train_limit: int | None = Field(None, ge=1, description="use N training rows of each client at most")
    test_limit: int | None = Field(
        None, ge=1, description="use N test rows, and N validation rows, of each client at most"
    )
    limit_by: Literal["sample", "first"] = Field(
        "sample",
        description="which rows a limit leaves: a sample, seeded as the deal is, in which few answers keep their "
        "shares; or the first",
    )
    canaries: int = Field(
        0,
        ge=0,
        le=1000,
        description="made-up rows with a secret, planted among each client's training rows; fedalt audit measures "
        "what is remembered of them. Scores of such a run are no evidence",
    )
    tinyworld: TinyworldConfig = TinyworldConfig()

    @field_validator("label_column")
    @classmethod
    def _no_text(cls, column: str | None, info: ValidationInfo) -> str | None:
        if column is not None and column in (info.data.get("text_columns") or ()):
            raise ValueError("is a column of the text, too")
        return column

    @property
    def limits(self) -> dict[str, int | None]:
        """Split → how many of a client's rows are used, at most."""
        return {"train": self.train_limit, "validation": self.test_limit, "test": self.test_limit}


def planted_note(count: int) -> str:
    """What has to be said wherever a score of such a run is shown."""
    return f"data.canaries: {count} made-up rows were planted in each client's; scores of such a run are no evidence"
