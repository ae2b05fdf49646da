"""A small language model of GPT-2's architecture, trained from scratch: how `gpt2-3m` was made.

    python examples/train_small_gpt2.py --text train.parquet --without abc webtext \
        --output output/gpt2-3m  # an hour
    python examples/train_small_gpt2.py --smoke

`--text` is a parquet file with a column `text`, and `source` where some sources are left out;
default: the sample that comes with the package. Rows are as the dictionaries see them: BOS first,
documents joined by BOS. Run again to go on from the last checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sae_lens_qk as qk

BOS = "<|endoftext|>"
CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="SOURCE",
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpt2-small-from-scratch"))
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    set_seed(0)
    data = qk.text_sample() if args.text is None else Dataset.from_parquet(str(args.text))
    texts = [row["text"] for row in data if row.get("source") not in args.without]
    if args.smoke:
        texts = texts[:40]
    tokenizer = trained_tokenizer(texts, 512 if args.smoke else 4096)
    rows = token_rows(tokenizer, texts)
    n_held_out = max(2, len(rows) // 100)
    held_out = rows[:n_held_out]
    rows = rows[n_held_out:]
    bos = tokenizer.bos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=48 if args.smoke else 192,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    model = GPT2LMHeadModel(config)
    n_parameters = model.num_parameters() / 1e6
    console = Console()
    console.print(f"{n_parameters:.1f}M parameters, {len(rows) * CONTEXT / 1e6:.2f}M tokens")
    checkpoints = args.output / "checkpoints"
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=args.epochs,
            max_steps=3 if args.smoke else -1,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            logging_steps=50,
            save_steps=200,
            save_total_limit=1,
            report_to=[],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=0,
            disable_tqdm=True,
        ),
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(held_out),
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    loss = trainer.evaluate()["eval_loss"]
    model.to(torch.float16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    bridge = qk.load_model(str(args.output))  # ready for a dictionary
    saved_loss = float(bridge(torch.tensor(held_out[:4]), return_type="loss"))
    console.print(f"held-out loss {loss:.3f} nats per token; as saved, {saved_loss:.3f} on 4 rows")


def trained_tokenizer(
    texts: list[str],
    vocab_size: int,
) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[BOS], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS
    )


def token_rows(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> np.ndarray:
    """[row, CONTEXT]: BOS first, documents joined by BOS."""
    bos = tokenizer.bos_token_id
    stream = np.concatenate([[*document, bos] for document in tokenizer(texts)["input_ids"]])
    n_rows = len(stream) // (CONTEXT - 1)
    rows = stream[: n_rows * (CONTEXT - 1)].reshape(n_rows, CONTEXT - 1)
    return np.concatenate([np.full((n_rows, 1), bos), rows], axis=1)


def as_dataset(rows: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


if __name__ == "__main__":
    main()
