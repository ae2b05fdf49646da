"""Command line: `python -m sae_lens_qk train | evaluate | explain | ...`.

A command is a function: its parameters are the options, its docstring is the help. Training takes
the fields of its config instead.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import transformers
from rich.box import SIMPLE
from rich.console import Console
from simple_parsing import ArgumentGenerationMode, ArgumentParser, NestedMode
from simple_parsing.helpers import field

from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.evals import evaluate
from sae_lens_qk.explain.attribution import Attribution, overview
from sae_lens_qk.explain.prompt import RecordedPrompt
from sae_lens_qk.explain.report import report
from sae_lens_qk.host.models import load_model
from sae_lens_qk.patching import Source
from sae_lens_qk.pretrained.folder import documents, write_documents
from sae_lens_qk.pretrained.push import registry_entry
from sae_lens_qk.pretrained.registry import pretrained_dictionaries, recipe_file
from sae_lens_qk.run_config import BilinearQKRunnerConfig
from sae_lens_qk.tables import NONE, cell_table, fixed, named_features, percent, rich_table
from sae_lens_qk.text import token_rows
from sae_lens_qk.training.runner import BilinearQKTrainingRunner

IOI_PROMPT = "When Mary and John went to the store, John gave a drink to"
DEFAULT_DICTIONARY = "smollm2-135m-instruct-L23"
RENAMED = {"dashboard": "report"}
"""Names of version 0.1 that still work, with a notice; they go with the next release."""

USAGE_ERRORS = (ValueError, OSError, ModuleNotFoundError, RuntimeError, FloatingPointError)


@dataclasses.dataclass
class TrainOptions:
    """Train a dictionary, both steps, from a config file and overriding options."""

    config: str = ""
    """YAML or JSON file with config fields, or a recipe's name (see `list`); options on the command
    line override it."""


def _train(arguments: Sequence[str]) -> None:
    config_parser = _Parser("train", add_help=False)
    config_parser.add_arguments(TrainOptions, dest="train")
    config_file = config_parser.parse_known_args(arguments)[0].train.config
    # the file's values are the defaults of the options, shown by --help
    defaults = BilinearQKRunnerConfig()
    if config_file:
        defaults = BilinearQKRunnerConfig.from_file(recipe_file(config_file))
    parser = _Parser("train")
    parser.add_arguments(TrainOptions, dest="train")
    parser.add_arguments(BilinearQKRunnerConfig, dest="cfg", default=defaults)
    cfg = parser.parse_args(arguments).cfg
    BilinearQKTrainingRunner(cfg).run()
    print(f"saved to {cfg.output_path}")


def _evaluate(
    dictionary: str,
    dataset_path: str = "",
    text_column: str = "text",
    n_tokens: int = 8_192,
    context_size: int = 256,
    batch_size: int = 8,
    baselines: tuple[str, ...] = ("zero", "mean", "uniform", "shuffled"),
    output: str = "",
    save: bool = False,
) -> None:
    """Measure a dictionary: pattern, loss and logits with each source patched in, and baselines.

    Args:
        dictionary: Name (see `list`) or folder.
        dataset_path: Text to evaluate on: Hub name, .parquet file or folder. Default: the sample
            that comes with the package.
        text_column: Column of the text.
        n_tokens: Tokens to evaluate on, whole rows.
        context_size: Length of a row.
        batch_size: Rows in a forward pass.
        baselines: Patterns to compare with; zero is always measured.
        output: JSON file for all metrics.
        save: Put the metrics into the dictionary's folder: metrics.json, model card, SHA256SUMS.
    """
    if save and not (Path(dictionary) / "cfg.json").is_file():
        raise ValueError(f"--save needs a dictionary's folder, got {dictionary!r}.")
    d = BilinearQKDictionary.from_pretrained(dictionary)
    model = load_model(d)
    n_rows = n_tokens // context_size
    tokens = token_rows(model, dataset_path, text_column, n_rows, context_size)
    result = evaluate(
        d,
        model,
        tokens,
        batch_size=batch_size,
        baselines=baselines,
        progress=True,
    )
    _console().print(result)
    if output:
        metrics = json.dumps(result.to_dict(), indent=2)
        Path(output).write_text(metrics)
    if save:
        d.metrics = result
        name = Path(dictionary).resolve().name
        write_documents(dictionary, documents(d, name))


def _explain(
    prompt: str,
    dictionary: str = DEFAULT_DICTIONARY,
    head: int | None = None,
    query: str = "-1",
    key: str = "",
    source: Source | None = None,
    n: int = 10,
    check: bool = False,
    output: str = "",
) -> None:
    """Why did this head attend there? The feature pairs behind one attention weight.

    Args:
        prompt: Text, or a file that holds it; the model's BOS is put before it.
        dictionary: Name (see `list`) or folder.
        head: Default: the head that looks hardest at a token other than the first; all heads are
            listed then.
        query: The attending token: its position (negative: from the end), or its text where it
            occurs once.
        key: The attended token, likewise. Default: the one that the head attends to most, the first
            token aside.
        source: feature_map: the pairs of the map, times their weights; transcoders: all pairs.
            Default: the map where there is one.
        n: Pairs to show of each sign.
        check: Remove the features from the model's own input and compare with controls (half a
            minute the first time).
        output: JSON file for the terms, with the field names of Neuronpedia's QK tracing.
    """
    d = BilinearQKDictionary.from_pretrained(dictionary)
    is_file = Path(prompt[:200]).is_file()  # a longer name is an error to some systems
    text = Path(prompt).read_text() if is_file else prompt
    recorded = RecordedPrompt.record(d, load_model(d), text)
    query_pos = recorded.find(query)
    console = _console()
    heads: Any = overview(recorded, query_pos)
    if head is None:
        title = f"where each head looks from {recorded.words[query_pos]!r}"
        console.print(rich_table(named_features(heads, d.cfg), title))
        head = int(heads["attention"].idxmax())
    recorded.position(head, query_pos, query_pos)  # refuses a head that is not there
    # by default what the listing says of this head
    key_pos = recorded.find(key) if key else int(heads["key_pos"][head])
    attribution = Attribution.of(recorded, head, query_pos, key_pos)
    if check:
        attribution = attribution.checked()
    console.print(attribution.render(n, source))
    if output:
        Path(output).write_text(attribution.to_json(n, source, indent=2))


def _report(
    dictionary: str = DEFAULT_DICTIONARY,
    prompts: tuple[str, ...] = (IOI_PROMPT,),
    dataset_path: str = "",
    text_column: str = "text",
    n_tokens: int = 25_600,
    context_size: int = 256,
    statistics: str = "",
    checks: int = 1,
    output: str = "report.html",
    limits: ReportLimits = ReportLimits(),  # noqa: B008  # frozen
) -> None:
    """Write what a dictionary says as one HTML file: prompts, heads, features and pairs.

    Args:
        dictionary: Name (see `list`) or folder.
        prompts: Texts to explain, at most 128 tokens each.
        dataset_path: Text for statistics and contexts: Hub name, .parquet file or folder. Default:
            the sample of the package.
        text_column: Column of the text.
        n_tokens: Tokens to read, whole rows.
        context_size: Length of a row.
        statistics: Folder where the statistics are stored; there already, they are read.
        checks: Explanations per prompt to test causally; 0: none.
        output: HTML file.
        limits: How much of the dictionary the file holds.
    """
    d = BilinearQKDictionary.from_pretrained(dictionary)
    d.require_feature_map()  # before the model is loaded, which takes a while
    model = load_model(d)
    n_rows = n_tokens // context_size
    path = report(
        output,
        d,
        model,
        prompts,
        token_rows(model, dataset_path, text_column, n_rows, context_size),
        statistics=statistics or None,
        checks=checks,
        limits=limits,
    )
    print(f"wrote {path}")


def _list(output: str = "") -> None:
    """Dictionaries that have a name, and the commands that train the unpublished ones.

    Args:
        output: CSV file for the whole table.
    """
    dictionaries = pretrained_dictionaries()
    if output:
        dictionaries.to_csv(output, index=False)
    header = ["name", "model", "layer", "features", "pairs", "pattern KL", "recovered", "status"]
    entries = dictionaries.to_dict("records")
    rows = [_list_cells(entry) for entry in entries]
    texts = ("name", "model", "status")
    table = cell_table(
        header,
        rows,
        texts,
        unbroken=header,
        box=SIMPLE,
        show_edge=False,
    )
    # commands are copied: no line breaks inside
    console = _console(soft_wrap=True)
    console.print(table)
    for entry in entries:
        if entry["status"] == "unpublished":
            notice = f"{entry['name']} is not published yet; this trains it: {entry['command']}"
            console.print(notice, highlight=False)


def _list_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a dictionary; nothing is known of some before they are downloaded."""
    model = layer = features = pairs = NONE
    if row["layer"] == row["layer"]:  # not NaN
        model = row["model"]
        layer = f"{row['layer']:.0f}"
        features = f"{row['d_query']:,.0f} / {row['d_key']:,.0f}"
        pairs = f"{row['n_pairs']:,.0f}"
    pattern_kl = fixed(row["pattern_kl"])
    recovered = percent(row["ce_recovered"])
    return [row["name"], model, layer, features, pairs, pattern_kl, recovered, row["status"]]


def _push(
    dictionary: str,
    repo_id: str,
    folder: str,
    dtype: Literal["stored", "float32", "float16", "bfloat16"] = "stored",
    private: bool = False,
    revision: str = "main",
    commit_message: str = "",
    create_pr: bool = False,
) -> None:
    """Publish on the Hugging Face Hub, in one commit; log in with `hf auth login` or set HF_TOKEN.

    Args:
        dictionary: Name (see `list`) or folder.
        repo_id: org/repo, created if need be.
        folder: Folder in the repository.
        dtype: Precision to store it in.
        private: Make a new repository private.
        revision: Branch to commit to.
        commit_message: Default: says what was published.
        create_pr: Open a pull request instead of committing.
    """
    # None keeps the precision of the file, and a dictionary is saved as it is in memory
    loaded_dtype = None if dtype == "stored" else dtype
    d = BilinearQKDictionary.from_pretrained(dictionary, dtype=loaded_dtype)
    commit = d.push_to_hub(
        repo_id,
        folder,
        private=private,
        revision=revision,
        commit_message=commit_message or None,
        create_pr=create_pr,
    )
    print(commit.pr_url or commit.commit_url)
    print(f"for a registry:\n{registry_entry(repo_id, folder, commit.oid)}")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "explain": _explain,
    "report": _report,
    "list": _list,
    "push": _push,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; after `--debug` errors are raised, not shortened.

    Returns:
        The exit code, 2 for wrong arguments.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    if debug:
        arguments = arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: python -m sae_lens_qk [--debug] {{{','.join(COMMANDS)}}} ...   "
            "(--help after a command explains it; --debug shows the traceback of an error)"
        )
        return 0 if arguments else 2
    name, *options = arguments
    if name in RENAMED:
        _complain(f"the command {name} is now {RENAMED[name]}")
        name = RENAMED[name]
    if name not in COMMANDS:
        return _complain(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    # its bars would stand between a command's own lines
    transformers.utils.logging.disable_progress_bar()
    try:
        if name == "train":
            _train(options)
        else:
            _run(name, options)
    except USAGE_ERRORS as error:
        if debug:
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _run(
    name: str,
    arguments: list[str],
) -> None:
    """Call a command with what the command line says."""
    command = COMMANDS[name]
    parser = _Parser(name)
    parser.add_arguments(_options(name, command), dest=name)
    values = getattr(parser.parse_args(arguments), name)
    # not `asdict`: the limits stay an object
    command(**vars(values))


def _options(
    name: str,
    command: Callable[..., None],
) -> type:
    """A function's parameters as a dataclass for simple_parsing; without default: positional."""
    # what precedes `Args:` describes the command, what follows its options
    summary, _, argument_lines = (inspect.getdoc(command) or "").partition("\n\nArgs:\n")
    # a name, a colon and what follows, up to the next line of the same indent
    texts = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", argument_lines, flags=re.MULTILINE)
    helps = {option: " ".join(text.split()) for option, text in texts}
    options = []
    for option, parameter in inspect.signature(command).parameters.items():
        if parameter.default is parameter.empty:
            option_field = field(positional=True, help=helps[option])
        else:
            option_field = field(default=parameter.default, help=helps[option])
        options.append((option, parameter.annotation, option_field))
    return dataclasses.make_dataclass(name, options, namespace={"__doc__": summary})


def _console(**options: Any) -> Console:
    # a file or pipe has no width of its own
    width = None if sys.stdout.isatty() else 132
    return Console(width=width, **options)


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
