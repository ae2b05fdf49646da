"""Do the terms of a score add up to the model's own, and do removed pairs do what their terms say?

    python -m benchmarks.speed.attribution    layers 0, 10 and 23 of SmolLM2, 50 prompts; 10 minutes

Both are checks of the code: linear in the scores, they hold for any dictionary. Layer 23 has the
shipped dictionary, layers 0 and 10 small ones trained for a few steps. For every head and every row
of every prompt:

    sum     largest |sum of all terms, errors included - the model's own score|, of all pairs and
            split into what the map gives and what it takes away
    drop    the 5 strongest pairs of each prompt's last row, removed inside the model's own scores
            by the patching hooks: largest error of the log pattern that the attribution predicts,
            where that is above -20
"""

import argparse
import tempfile
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Model

SHIPPED = {23: "smollm2-135m-instruct-L23"}
_LEAST_LOG_PATTERN = -20
_N_PAIRS = 5


class Errors(NamedTuple):
    """Largest errors over prompts, heads and rows, and the largest score."""

    sum: float
    split_sum: float
    drop: float
    score: float


def small_dictionary(
    model: Model,
    layer: int,
) -> qk.BilinearQKDictionary:
    """A few steps on the text that comes with the package."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = qk.BilinearQKRunnerConfig(
            layer=layer,
            sae=qk.TranscodersTrainingConfig(
                d_in=1,
                d_query=512,
                d_key=512,
            ),
            training_tokens=10 * 2048,
            mask=qk.MaskStepConfig(
                training_tokens=5 * 2048, n_pairs=5_000, n_candidates=20_000, ranking_tokens=2048
            ),
            lr_warm_up_steps=2,
            checkpoint_path=None,
            output_path=f"{folder}/dictionary",
        )
        runner = qk.BilinearQKTrainingRunner(
            cfg, override_dataset=qk.text_sample(), override_model=model
        )
        return runner.run()


@torch.no_grad()
def measure(
    d: qk.BilinearQKDictionary,
    model: Model,
    prompts: torch.Tensor,
) -> Errors:
    worst = Errors(0.0, 0.0, 0.0, 0.0)
    for tokens in tqdm(prompts, desc=f"layer {d.cfg.layer}"):
        prompt = qk.RecordedPrompt.record(d, model, tokens)
        for head in range(d.spec.n_heads):
            errors = [_row_errors(prompt, head, i) for i in range(len(tokens))]
            errors.append(Errors(0.0, 0.0, drop_error(prompt, head), 0.0))
            worst = Errors(*map(max, zip(worst, *errors, strict=True)))
    return worst


def _row_errors(
    prompt: qk.RecordedPrompt,
    head: int,
    query_pos: int,
) -> Errors:
    """Errors of both sums in one row of scores."""
    own = prompt.scores[head, query_pos, : query_pos + 1]
    terms = prompt.terms(head, query_pos)
    weights = terms.weights(prompt.dictionary.feature_map, head)
    mapped = terms._replace(terms=terms.terms * weights).scores
    masked = terms._replace(terms=terms.terms * (1 - weights)).scores
    allowed = prompt.dictionary.spec.allowed(query_pos, torch.arange(query_pos + 1))
    return Errors(
        sum=float((terms.scores - own)[allowed].abs().max()),
        split_sum=float((mapped + masked - own)[allowed].abs().max()),
        drop=0.0,
        score=float(own[allowed].abs().max()),
    )


def drop_error(
    prompt: qk.RecordedPrompt,
    head: int,
) -> float:
    """Ablated by hooks in the model, against the attribution's terms."""
    d = prompt.dictionary
    query_pos = len(prompt.tokens) - 1
    key_pos = int(prompt.pattern[head, query_pos].argmax())
    attribution = qk.attribute(d, prompt.model, prompt, head, query_pos, key_pos)
    triples = attribution.triples(_N_PAIRS, source="transcoders")
    if not len(triples):
        return 0.0
    hooks = d.fwd_hooks(prompt.model, "model", ablate_pairs=triples)
    record = AttentionLayer(prompt.model, d.cfg.layer).record(prompt.tokens[None], hooks)
    terms = prompt.terms(head, query_pos)
    scores = prompt.scores[head, query_pos].clone()
    for a, b, _ in triples.tolist():
        scores -= terms.pairs(torch.tensor([a]), torch.tensor([b]))[0, 0]
    expected = d.spec.row_pattern(scores, head, query_pos).log()
    actual = record.pattern[0, head, query_pos].log()
    return float((actual - expected)[expected > _LEAST_LOG_PATTERN].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[0, 10, 23],
    )
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    model = qk.load_model()
    prompts = qk.token_rows(model, "", "text", args.prompts, args.length)
    table = Table("layer", "dictionary", "sum", "sum, split by the map", "drop", "largest score")
    for layer in args.layers:
        name = SHIPPED.get(layer)
        if name:
            d = qk.BilinearQKDictionary.from_pretrained(name)
        else:
            d = small_dictionary(model, layer)
        errors = measure(d, model, prompts)
        cells = [f"{error:.1e}" for error in errors[:3]]
        table.add_row(str(layer), name or "trained for 10 steps", *cells, f"{errors.score:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
