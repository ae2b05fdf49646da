"""Command line: `python -m sae_lens_qk train | evaluate`. Help is generated from the configs and argument classes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import transformers
from simple_parsing import ArgumentGenerationMode, ArgumentParser, NestedMode
from simple_parsing.helpers import field


@dataclass
class EvaluateArguments:
    """Measure a dictionary: pattern, loss and logits with each source patched in, beside the baselines."""

    dictionary: str = field(positional=True)
    """Shipped name or folder."""
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


@dataclass
class TrainArguments:
    """Train a dictionary, both steps, from a config file and overriding options."""

    config: str = ""
    """YAML or JSON file with config fields; options on the command line override it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 2 for wrong arguments. After `--debug` errors are raised, not shortened."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    if debug:
        arguments = arguments[1:]
    commands = {"train": _train, "evaluate": _evaluate}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: python -m sae_lens_qk [--debug] {train,evaluate} ...   "
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
    from sae_lens_qk.config import BilinearQKRunnerConfig
    from sae_lens_qk.training.runner import BilinearQKTrainingRunner

    first = _Parser("train", add_help=False)
    first.add_arguments(TrainArguments, dest="train")
    known, _ = first.parse_known_args(arguments)
    base = BilinearQKRunnerConfig.from_file(known.train.config) if known.train.config else BilinearQKRunnerConfig()
    parser = _Parser("train")
    parser.add_arguments(TrainArguments, dest="train")
    parser.add_arguments(BilinearQKRunnerConfig, dest="cfg", default=base)
    cfg = parser.parse_args(arguments).cfg
    BilinearQKTrainingRunner(cfg).run()
    print(f"saved to {cfg.output_path}")


def _evaluate(arguments: list[str]) -> None:
    from rich.console import Console

    from sae_lens_qk.dictionary import BilinearQKDictionary
    from sae_lens_qk.evals import evaluate
    from sae_lens_qk.models import load_model
    from sae_lens_qk.text import token_rows

    parser = _Parser("evaluate")
    parser.add_arguments(EvaluateArguments, dest="evaluate")
    args: EvaluateArguments = parser.parse_args(arguments).evaluate
    dictionary = BilinearQKDictionary.from_pretrained(args.dictionary)
    model = load_model(dictionary)
    tokens = token_rows(model, args.dataset_path, args.text_column, args.n_tokens // args.context_size, args.context_size)
    result = evaluate(dictionary, model, tokens, batch_size=args.batch_size, baselines=tuple(args.baselines), progress=True)
    Console(width=None if sys.stdout.isatty() else 132).print(result)  # a file or pipe has no width of its own
    if args.output:
        Path(args.output).write_text(json.dumps(result.to_dict(), indent=2))


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
