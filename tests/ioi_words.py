"""Indirect-object prompts for the tiny models: a tokenizer of words, and few of them."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.ioi.prompts import IOIPrompts

WORDS = dict(
    templates=(
        "When {first} and {second} met, {subject} gave a {object} to",
        "At the {place} {first} saw {second}. {subject} ran to",
    ),
    names=("Mary", "John", "Tom", "Ann", "Bob", "Sue", "Jo-Jo"),
    places=("sea", "zoo"),
    objects=("pen", "hat", "tea-cup"),
)
"""What `ioi_prompts` is given; words with a hyphen are several tokens."""
PROMPT_TOKENS = (11, 12)
"""Tokens of the templates, BOS included."""
N_PROMPTS = 7


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A token per word, with the space before it; hyphens and stops are tokens."""
    words = "When At the and met gave a to saw ran".split()
    for kind in ("names", "places", "objects"):
        for word in WORDS[kind]:
            words += word.split("-")
    special = ["<unk>", "<bos>", ",", ".", "-", "When", "At"]
    vocabulary = [*special, *(f" {word}" for word in dict.fromkeys(words))]
    assert len(vocabulary) < 101  # what tiny models know
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    options = {"bos_token": "<bos>", "add_bos_token": True} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", name_or_path="tiny", **options
    )


def first_prompts(
    batch: IOIPrompts,
    n: int,
) -> IOIPrompts:
    return IOIPrompts(*(tensor[:n] for tensor in batch))
