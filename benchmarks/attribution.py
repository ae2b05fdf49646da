"""Do the terms of an attention score add up to the model's own, and do removed pairs do what their terms say?

    python benchmarks/attribution.py            # layers 0, 10 and 23 of SmolLM2, 50 prompts; 10 minutes

Both are checks of the code: linear in the scores, they hold for any dictionary. Layer 23 has the shipped dictionary,
layers 0 and 10 small ones trained for a few steps. For every head and every row of every prompt:

    sum     largest |sum of all terms, errors included - the model's own score|, in full and in kept form
    drop    the 5 strongest pairs of each prompt's last row, removed inside the model's own scores by the patching hooks:
            largest error of the log pattern that the attribution predicts, where that is above -20
"""

import argparse
import tempfile
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import sae_lens_qk as qk
from sae_lens_qk.explain.attribution import Attribution
from sae_lens_qk.host.support import Model
from sae_lens_qk.host.layer import hook_names, run_recording
from sae_lens_qk.text import text_sample, token_rows

SHIPPED = {23: "smollm2-135m-instruct-L23"}


class Errors(NamedTuple):
    """Largest errors over prompts, heads and rows, and the largest score."""

    full: float
    kept: float
    drop: float
    score: float


def small_dictionary(model: Model, layer: int) -> qk.BilinearQKDictionary:
    """A few steps on the text that comes with the package."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = qk.BilinearQKRunnerConfig(
            layer=layer,
            sae=qk.TranscodersTrainingConfig(d_in=1, d_query=512, d_key=512),
            training_tokens=10 * 2048,
            mask=qk.MaskStepConfig(
                training_tokens=5 * 2048, n_pairs=5_000, n_candidates=20_000, ranking_tokens=2048
            ),
            lr_warm_up_steps=2,
            checkpoint_path=None,
            output_path=f"{folder}/dictionary",
        )
        return qk.BilinearQKTrainingRunner(
            cfg, override_model=model, override_dataset=text_sample()
        ).run()


@torch.no_grad()
def measure(d: qk.BilinearQKDictionary, model: Model, prompts: torch.Tensor) -> Errors:
    worst = [0.0] * 4
    for tokens in tqdm(prompts, desc=f"layer {d.cfg.layer}"):
        prompt = qk.Prompt.of(d, model, tokens)
        for head in range(d.spec.n_heads):
            for i in range(len(tokens)):
                own, terms = prompt.scores[head, i, : i + 1], prompt.terms(head, i)
                m = terms.weights(d.feature_map, head)
                split = (
                    terms._replace(terms=terms.terms * m).scores
                    + terms._replace(terms=terms.terms * (1 - m)).scores
                )
                found = [(made - own).abs().max() for made in (terms.scores, split)]
                worst[0], worst[1] = (
                    max(worst[at], float(error)) for at, error in enumerate(found)
                )
            worst[2] = max(worst[2], drop_error(prompt, head))
        worst[3] = max(worst[3], float(prompt.scores.tril().abs().max()))
    return Errors(*worst)


def drop_error(prompt: qk.Prompt, head: int) -> float:
    """Ablated by hooks in the model, against the attribution's terms."""
    d, i = prompt.dictionary, len(prompt.tokens) - 1
    j = int(prompt.pattern[head, i].argmax())
    triples = Attribution.of(prompt, head, i, j).triples(5, form="full")
    if not len(triples):
        return 0.0
    name = hook_names(prompt.model, d.cfg.layer).pattern
    hooks = d.fwd_hooks(prompt.model, "model", ablate_pairs=triples)
    _, seen = run_recording(
        prompt.model, prompt.tokens[None], [name], hooks, stop_at_layer=d.cfg.layer + 1
    )
    terms, expected = prompt.terms(head, i), prompt.scores[head, i].clone()
    for a, b, _ in triples.tolist():
        expected -= terms.pairs(torch.tensor([a]), torch.tensor([b]))[0, 0]
    left, expected = seen[name][0, head, i].log(), expected.log_softmax(dim=-1)
    return float((left - expected)[expected > -20].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 23])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    model = qk.load_model()
    prompts = token_rows(model, "", "text", args.prompts, args.length)
    table = Table(
        "layer", "dictionary", "sum, full form", "sum, kept form", "drop", "largest score"
    )
    for layer in args.layers:
        name = SHIPPED.get(layer)
        d = (
            qk.BilinearQKDictionary.from_pretrained(name)
            if name
            else small_dictionary(model, layer)
        )
        errors = measure(d, model, prompts)
        figures = [f"{error:.1e}" for error in errors[:3]]
        table.add_row(str(layer), name or "trained for 10 steps", *figures, f"{errors.score:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
