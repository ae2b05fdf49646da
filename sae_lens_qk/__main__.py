"""Command line: `python -m sae_lens_qk train | evaluate | explain | ...`; help comes from configs and argument classes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import pandas as pd
import transformers
from rich.console import Console
from simple_parsing import ArgumentGenerationMode, ArgumentParser, NestedMode
from simple_parsing.helpers import field

_FIRST_TOKEN_BATCHES = 3
"""Batches of text on which a report looks for the features of the first token."""
IOI_PROMPT = "When Mary and John went to the store, John gave a drink to"


@dataclass
class DashboardArguments:
    """Write what a dictionary has found as one HTML file that needs no server: prompts, heads, features and pairs."""

    dictionary: str = "smollm2-135m-instruct-L23"
    """Name (see `list`) or folder."""
    prompts: list[str] = field(default_factory=lambda: [IOI_PROMPT])
    """Texts to explain, at most 128 tokens each."""
    dataset_path: str = ""
    """Text for statistics and contexts: Hub name, .parquet file or folder. Default: the sample of the package."""
    text_column: str = "text"
    n_tokens: int = 25_600
    """Tokens to read, whole rows."""
    context_size: int = 256
    """Length of a row."""
    statistics: str = ""
    """Folder where the statistics are kept; an interrupted pass goes on from there."""
    n_features: int = 1000
    """Features of each side to show, the most important ones."""
    n_pairs: int = 5000
    """Pairs to show."""
    output: str = "report.html"


@dataclass
class EvaluateArguments:
    """Measure a dictionary: pattern, loss and logits with each source patched in, beside the baselines."""

    dictionary: str = field(positional=True)
    """Name (see `list`) or folder."""
    dataset_path: str = ""
    """Text to evaluate on: Hub name, .parquet file or folder. Default: the sample that comes with the package."""
    text_column: str = "text"
    n_tokens: int = 8_192
    """Tokens to evaluate on, whole rows."""
    context_size: int = 256
    """Length of a row."""
    batch_size: int = 8
    """Rows in a forward pass."""
    baselines: list[str] = field(default_factory=lambda: ["zero", "mean", "uniform", "shuffled"])
    """Patterns to compare with; zero is always measured."""
    output: str = ""
    """JSON file for all figures."""
    save: bool = False
    """Put the figures into the dictionary's folder: metrics.json, model card, SHA256SUMS."""


@dataclass
class ExplainArguments:
    """Why did this head attend there? The feature pairs behind one attention weight, supporting and inhibiting."""

    prompt: str = field(positional=True)
    """Text, or a file that holds it; the model's BOS is put before it."""
    dictionary: str = "smollm2-135m-instruct-L23"
    """Name (see `list`) or folder."""
    head: int | None = None
    """Default: the head that looks hardest at a token other than the first; all heads are listed then."""
    query: str = "-1"
    """The attending token: its position (negative: from the end), or its text where it occurs once."""
    key: str = ""
    """The attended token, likewise. Default: the one that the head attends to most, the first token aside."""
    form: Literal["kept", "full"] = "kept"
    """kept: the pairs of the feature map, times their weights; full: all pairs."""
    n: int = 10
    """Pairs to show of each sign."""
    check: bool = False
    """Remove the features from the model's own input and compare with controls (half a minute the first time)."""
    output: str = ""
    """JSON file for the terms, with the field names of Neuronpedia's QK tracing."""


@dataclass
class ListArguments:
    """Dictionaries that have a name, what is known of them, and the commands that train the unpublished ones."""

    output: str = ""
    """CSV file for the whole table."""


@dataclass
class PushArguments:
    """Publish a dictionary on the Hugging Face Hub, in one commit; log in with `hf auth login` or set HF_TOKEN."""

    dictionary: str = field(positional=True)
    """Name (see `list`) or folder."""
    repo_id: str = field(positional=True)
    """org/repo, created if need be."""
    folder: str = field(positional=True)
    """Folder in the repository."""
    dtype: Literal["stored", "float32", "float16", "bfloat16"] = "stored"
    """Precision to store it in."""
    private: bool = False
    """Make a new repository private."""
    revision: str = "main"
    """Branch to commit to."""
    commit_message: str = ""
    create_pr: bool = False
    """Open a pull request instead of committing."""


@dataclass
class TrainArguments:
    """Train a dictionary, both steps, from a config file and overriding options."""

    config: str = ""
    """YAML or JSON file with config fields, or a recipe's name (see `list`); options on the command line override it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for wrong arguments. After `--debug` errors are raised, not shortened."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    if debug:
        arguments = arguments[1:]
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "explain": _explain,
        "dashboard": _dashboard,
        "list": _list,
        "push": _push,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: python -m sae_lens_qk [--debug] {{{','.join(commands)}}} ...   "
            "(--help after a command explains it; --debug shows the traceback of an error)"
        )
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return _complain(f"unknown command {arguments[0]!r}: use one of {', '.join(commands)}")
    transformers.utils.logging.disable_progress_bar()
    try:
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _train(arguments: list[str]) -> None:
    from sae_lens_qk.run_config import BilinearQKRunnerConfig
    from sae_lens_qk.pretrained.registry import recipe_file
    from sae_lens_qk.training.runner import BilinearQKTrainingRunner

    first = _Parser("train", add_help=False)
    first.add_arguments(TrainArguments, dest="train")
    known, _ = first.parse_known_args(arguments)
    base = (
        BilinearQKRunnerConfig.from_file(recipe_file(known.train.config))
        if known.train.config
        else BilinearQKRunnerConfig()
    )
    parser = _Parser("train")
    parser.add_arguments(TrainArguments, dest="train")
    parser.add_arguments(BilinearQKRunnerConfig, dest="cfg", default=base)
    cfg = parser.parse_args(arguments).cfg
    BilinearQKTrainingRunner(cfg).run()
    print(f"saved to {cfg.output_path}")


def _evaluate(arguments: list[str]) -> None:
    from sae_lens_qk.dictionary import BilinearQKDictionary
    from sae_lens_qk.evals import evaluate
    from sae_lens_qk.host.models import load_model
    from sae_lens_qk.pretrained.folder import documents, write_documents
    from sae_lens_qk.text import token_rows

    parser = _Parser("evaluate")
    parser.add_arguments(EvaluateArguments, dest="evaluate")
    args: EvaluateArguments = parser.parse_args(arguments).evaluate
    if args.save and not (Path(args.dictionary) / "cfg.json").is_file():
        raise ValueError(f"--save needs a dictionary's folder, got {args.dictionary!r}.")
    dictionary = BilinearQKDictionary.from_pretrained(args.dictionary)
    model = load_model(dictionary)
    tokens = token_rows(
        model,
        args.dataset_path,
        args.text_column,
        args.n_tokens // args.context_size,
        args.context_size,
    )
    result = evaluate(
        dictionary,
        model,
        tokens,
        batch_size=args.batch_size,
        baselines=tuple(args.baselines),
        progress=True,
    )
    _console().print(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result.to_dict(), indent=2))
    if args.save:
        dictionary.metrics = result
        write_documents(
            args.dictionary, documents(dictionary, Path(args.dictionary).resolve().name)
        )


def _explain(arguments: list[str]) -> None:
    from sae_lens_qk.explain.attribution import Attribution, overview
    from sae_lens_qk.explain.prompt import Prompt
    from sae_lens_qk.tables import named_features, rich_table
    from sae_lens_qk.dictionary import BilinearQKDictionary
    from sae_lens_qk.host.models import load_model

    parser = _Parser("explain")
    parser.add_arguments(ExplainArguments, dest="explain")
    args: ExplainArguments = parser.parse_args(arguments).explain
    dictionary = BilinearQKDictionary.from_pretrained(args.dictionary)
    text = Path(args.prompt).read_text() if Path(args.prompt[:200]).is_file() else args.prompt
    prompt = Prompt.of(dictionary, load_model(dictionary), text)
    query_pos, console = prompt.find(args.query), _console()
    looks: Any = overview(prompt, query_pos)
    if args.head is None:
        console.print(
            rich_table(
                named_features(looks, dictionary.cfg),
                f"where each head looks from {prompt.words[query_pos]!r}",
            )
        )
    head = int(looks["attention"].idxmax()) if args.head is None else args.head
    prompt.place(head, query_pos, 0)
    key_pos = prompt.find(args.key) if args.key else int(looks["key_pos"][head])
    made = Attribution.of(prompt, head, query_pos, key_pos)
    console.print(made.shown(args.n, args.form if dictionary.has_feature_map else "full"))
    if args.check:
        console.print(made.check())
    if args.output:
        Path(args.output).write_text(made.to_json(args.n, indent=2))


def _dashboard(arguments: list[str]) -> None:
    from sae_lens_qk.statistics.activations import collect_activations, model_batches
    from sae_lens_qk.explain.prompt import Prompt
    from sae_lens_qk.dashboard.data import ReportLimits
    from sae_lens_qk.dashboard.head_tables import head_tables
    from sae_lens_qk.dashboard.report import write_report
    from sae_lens_qk.dictionary import BilinearQKDictionary
    from sae_lens_qk.host.layer import layer_inputs
    from sae_lens_qk.host.models import load_model
    from sae_lens_qk.text import token_rows

    parser = _Parser("dashboard")
    parser.add_arguments(DashboardArguments, dest="dashboard")
    args: DashboardArguments = parser.parse_args(arguments).dashboard
    dictionary = BilinearQKDictionary.from_pretrained(args.dictionary)
    dictionary.require_feature_map()
    model, layer = load_model(dictionary), dictionary.cfg.layer
    prompts = [Prompt.of(dictionary, model, text) for text in args.prompts]
    tokens = token_rows(
        model,
        args.dataset_path,
        args.text_column,
        args.n_tokens // args.context_size,
        args.context_size,
    )
    batches = model_batches(model, layer, tokens)
    statistics = collect_activations(dictionary, batches, folder=args.statistics or None)
    path = write_report(
        args.output,
        dictionary,
        statistics,
        prompts,
        words=lambda ids: model.tokenizer.batch_decode([[token] for token in ids]),
        limits=ReportLimits(features=args.n_features, pairs=args.n_pairs),
        inputs=lambda rows: layer_inputs(model, layer, rows),
        tables=head_tables(dictionary, statistics, islice(batches, _FIRST_TOKEN_BATCHES)),
    )
    print(f"wrote {path}")


def _list(arguments: list[str]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from sae_lens_qk.pretrained.registry import pretrained_dictionaries

    parser = _Parser("list")
    parser.add_arguments(ListArguments, dest="list")
    args: ListArguments = parser.parse_args(arguments).list
    listed = pretrained_dictionaries()
    if args.output:
        listed.to_csv(args.output, index=False)
    table = Table(box=SIMPLE, show_edge=False)
    for column in (
        "name",
        "model",
        "layer",
        "features",
        "pairs",
        "pattern KL",
        "recovered",
        "status",
    ):
        table.add_column(
            column,
            no_wrap=True,
            justify="left" if column in ("name", "model", "status") else "right",
        )
    for row in listed.to_dict("records"):
        measured = not pd.isna(row["pattern_kl"])
        figures = (
            (f"{row['pattern_kl']:.4f}", f"{row['ce_recovered']:.1%}") if measured else ("-", "-")
        )
        known = not pd.isna(row["layer"])
        sizes = [
            f"{row['layer']:.0f}",
            f"{row['d_query']:,.0f} / {row['d_key']:,.0f}",
            f"{row['n_pairs']:,.0f}",
        ]
        table.add_row(
            row["name"],
            row["model"] if known else "-",
            *(sizes if known else "---"),
            *figures,
            row["status"],
        )
    console = _console(soft_wrap=True)
    console.print(table)
    for name, command in listed.loc[
        listed["status"] == "unpublished", ["name", "command"]
    ].to_numpy():
        console.print(f"{name} is not published yet; this trains it: {command}", highlight=False)


def _push(arguments: list[str]) -> None:
    from sae_lens_qk.dictionary import BilinearQKDictionary
    from sae_lens_qk.pretrained.push import registry_entry

    parser = _Parser("push")
    parser.add_arguments(PushArguments, dest="push")
    args: PushArguments = parser.parse_args(arguments).push
    dictionary = BilinearQKDictionary.from_pretrained(
        args.dictionary, dtype=None if args.dtype == "stored" else args.dtype
    )
    commit = dictionary.push_to_hub(
        args.repo_id,
        args.folder,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message or None,
        create_pr=args.create_pr,
    )
    print(commit.pr_url or commit.commit_url)
    print(f"for a registry:\n{registry_entry(args.repo_id, args.folder, commit.oid)}")


def _console(**options: Any) -> Console:
    return Console(
        width=None if sys.stdout.isatty() else 132, **options
    )  # a file or pipe has no width of its own


class _Parser(ArgumentParser):
    """Options named as in the config file (`--sae.k`, `--mask.lr`); errors in one line."""

    def __init__(self, command: str, **options: Any):
        super().__init__(
            prog=f"python -m sae_lens_qk {command}",
            nested_mode=NestedMode.WITHOUT_ROOT,
            argument_generation_mode=ArgumentGenerationMode.NESTED,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sae_lens_qk: {message} (see {self.prog} --help)\n")


def _complain(message: str) -> int:
    print(f"sae_lens_qk: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
