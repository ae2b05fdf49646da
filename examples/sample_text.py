"""Draw a text sample from the embedded model: SmolLM2-135M-Instruct continues varied openings.

The demo and the tests need a few hundred thousand tokens of ordinary text that come from nowhere
but the model they study: no download, no licence but the model's. Each document is an opening,
built from the lists below, and a continuation of fixed length, without chat template or special
tokens. The result is a parquet file with one string column `text`, a document per row; the settings
are in the metadata of its schema.

    python examples/sample_text.py            # 210,000 tokens, into the package
    python examples/sample_text.py --smoke    # a few dozen tokens, into the temporary folder

Unless the settings change, an interrupted run goes on from `<output>.partial.parquet`. The same
settings give the same text on the same machine; elsewhere rounding may lead to other words.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sae_lens_qk.host.models import EMBEDDED_MODEL, embedded_model_folder

DEFAULT_OUTPUT = Path(__file__).parents[1] / "sae_lens_qk" / "data" / "smollm2_sample.parquet"

TEMPLATES = (
    # Two or three people, one of them named again: the indirect object and its neighbours.
    "When {a} and {b} went to the {spot}, {b} gave {thing} to",
    "When {b} and {a} met at the {spot}, {a} handed {thing} to",
    "Then, {a} and {b} had a long argument at the {spot}, and afterwards {a} said to",
    "After {a} and {b} came home from the {spot}, {a} offered {thing} to",
    "{a}, {b} and {c} were sitting in the {spot}. {a} passed {thing} to {b}, and {c}",
    "{a} is older than {b}, and {b} is older than {c}. So",
    "While {a} was working at the {spot}, {b} bought {thing} for",
    "{a} told {b} that {c} had lost {thing} near the {spot}.",
    # Stories.
    "Once upon a time, in a small village near {city}, there lived a {animal} who",
    "It was a cold morning in {city} when {a} found {thing} in front of the {spot}.",
    "{a} had never been to {city} before. The first thing {a} saw there was",
    "Nobody in {city} knew why {a} kept {thing} under the bed.",
    "Chapter One\n\nThe train to {city} was late, and {a} was",
    "The old house by the {spot} had been empty since {year}, until {a} and {b}",
    "{a} looked at the map again. Somewhere between {city} and {town} there had to be",
    "My grandmother, {a}, grew up in {city}, where her father worked in a {spot}.",
    # News.
    "{city}, {month} {day} - Officials said on {weekday} that",
    "{city} - The city council voted on {weekday} to close the {spot} after",
    "Researchers at the University of {city} reported in {month} that {topic}",
    "The mayor of {city}, {a} {surname}, announced on {weekday} a plan to",
    "Shares of {surname} & {surname_b} fell {small} percent on {weekday} after the company",
    "{city} beat {town} {small} to 1 on {weekday} evening, with {surname} scoring",
    "Police in {city} are looking for a man who stole {thing} from a {spot} on {weekday}.",
    "A storm that hit {city} on {weekday} left {number} homes without power, and",
    # Encyclopaedia, history, science.
    "The {animal} is a",
    "The {animal} lives mainly in",
    "In short, {topic} is",
    "The origins of {topic} lie in",
    "{city} is a city in",
    "The history of {topic} in {city} began in {year}, when",
    "In {year}, the people of {city} were",
    "{a} {surname} ({year} - {year_b}) was a",
    "The {surname} Bridge in {city} was built in {year} by",
    "The war that began in {year} had three main causes. First,",
    "In {year}, {surname} published a book on {topic} which showed that",
    "One of the most important questions in {topic} is whether",
    "There are {small} things that every {animal} needs. The first",
    "Abstract. We study the relation between {topic} and {topic_b}. Our results",
    "The difference between {topic} and {topic_b} is that",
    # Dialogue, letters, opinions.
    '"Have you seen {thing}?" asked {a}.\n\n"No," said {b}, "but',
    '"I am not going to {city} with you," said {a}. {b}',
    "{a}: What did you do on {weekday}?\n{b}:",
    "Interviewer: How did you become interested in {topic}?\n{a} {surname}:",
    "Dear {a},\n\nThank you for your letter of {month} {day}. I",
    "Dear Mr. {surname},\n\nI am writing to you about {thing} that",
    "Hi {a},\n\nI hope you had a good time in {city}. {b} and I",
    "Subject: Meeting on {weekday}\n\nHello {a},\n\n{b} asked me to",
    "{weekday}, {month} {day}\n\nDear diary, today {a} and I went to the {spot} and",
    "I bought this {device} in {month}, and after {small} weeks",
    "We stayed at a hotel in {city} for {small} nights. The room",
    "This book about {topic} by {a} {surname} is",
    "The new restaurant next to the {spot} in {city} serves {food} that",
    "Every child should learn {topic} at school, because",
    "I disagree with {surname}, who wrote that {topic}",
    # Recipes, instructions, lists.
    "Recipe: {food} with {food_b}\n\nIngredients:\n- {small} cups of",
    "To make {food} for {small} people, you need",
    "My favourite recipe for {food} comes from {city}. First,",
    "How to repair a {device}\n\nStep 1:",
    "Before you use the {device} for the first time,",
    "If your {device} does not work, first check whether",
    "How to teach {topic} to children:\n\n1.",
    "Five things to see in {city}:\n\n1. The {spot},",
    "If you want to keep a {animal} at home, you should know that",
    # Schoolwork and work.
    "{a} has {number} apples. {b} gives {a} {small} more. How many",
    "Question: What is {topic}?\n\nAnswer:",
    "Question: Why does the {animal} have",
    "Lesson {small}: An introduction to {topic}. In this lesson, you will",
    "Minutes of the meeting of {month} {day}, {year}. Present: {a} {surname}, {b} {surname_b}.",
    "{a} {surname} works as an engineer in {city}. Last {weekday},",
    "The contract between {surname} and {surname_b} says that",
)

PEOPLE = (
    "Mary John Alice Tom Sarah James Anna Peter Emma David Laura Michael Julia Daniel Kate Robert "
    "Nina Paul Grace Henry Lucy Simon Maria Carlos Aisha Omar Mei Hiro Priya Ravi Fatima Ivan Olga "
    "Kofi Amara Diego Elena Jack Sophie Ben"
).split()
SURNAMES = (
    "Smith Johnson Baker Cooper Miller Evans Morgan Reed Hughes Foster Bennett Carter Lopez Silva "
    "Rossi Meyer Novak Petrov Tanaka Chen Singh Khan Okafor Mensah Larsen Dubois Walsh Murphy "
    "Stone Field"
).split()
CITIES = (
    "London Paris Berlin Madrid Rome Vienna Prague Dublin Oslo Lisbon Athens Boston Chicago Denver "
    "Seattle Toronto Lima Bogota Nairobi Lagos Cairo Accra Mumbai Delhi Tokyo Kyoto Seoul Hanoi "
    "Manila Sydney Istanbul Warsaw"
).split()
SPOTS = (
    "store park school library station market hospital museum restaurant garden office beach "
    "harbor theater church bakery cinema castle factory bank airport lake"
).split()
THINGS = (
    "a drink,a book,an apple,a ring,a letter,a key,a basket,an old watch,a red umbrella,"
    "a bottle of milk,a small box,a guitar,a photograph,a ticket,a blue scarf,a kite,a lamp,"
    "a necklace,a bag of coins,a violin,an orange,a bone"
).split(",")
ANIMALS = (
    "dog,cat,horse,fox,gray wolf,brown bear,barn owl,penguin,dolphin,blue whale,green turtle,"
    "honey bee,monarch butterfly,frog,snow leopard,camel,kangaroo,parrot,rabbit,salmon,crab,snail"
).split(",")
TOPICS = (
    "mathematics,astronomy,chemistry,music,agriculture,photography,medicine,geology,economics,"
    "architecture,philosophy,poetry,climate change,evolution,gravity,electricity,photosynthesis,"
    "trade,democracy,chess,football,painting,printing,sleep,artificial intelligence,language,"
    "memory,education,law,engineering"
).split(",")
FOODS = (
    "tomato soup,rice,pasta,apple pie,lentils,roast chicken,fish,pancakes,bread,potato salad,"
    "beef stew,chocolate cake,curry,noodles,mushrooms,garlic,cheese,beans,carrots,omelette,"
    "pumpkin,spinach"
).split(",")
DEVICES = (
    "camera,laptop,bicycle,washing machine,coffee machine,vacuum cleaner,phone,printer,"
    "lawn mower,radio,tent,clock,toaster,dishwasher,keyboard,heater,drill,sewing machine"
).split(",")
MONTHS = (
    "January February March April May June July August September October November December".split()
)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def openings(seed: int) -> Iterator[str]:
    """Distinct openings without end: every template once, shuffled, blanks filled; then again."""
    rng = random.Random(seed)
    earlier_openings: set[str] = set()
    while True:
        for template in rng.sample(TEMPLATES, len(TEMPLATES)):
            opening = template.format_map(_blanks(rng))
            if opening not in earlier_openings:
                earlier_openings.add(opening)
                yield opening


def _blanks(rng: random.Random) -> dict[str, str | int]:
    """One random filling of all blanks; blanks of one list differ from each other."""
    blanks: dict[str, str | int] = {}
    blanks["a"], blanks["b"], blanks["c"] = rng.sample(PEOPLE, 3)
    blanks["surname"], blanks["surname_b"] = rng.sample(SURNAMES, 2)
    blanks["city"], blanks["town"] = rng.sample(CITIES, 2)
    blanks["topic"], blanks["topic_b"] = rng.sample(TOPICS, 2)
    blanks["food"], blanks["food_b"] = rng.sample(FOODS, 2)
    lists = {
        "animal": ANIMALS,
        "spot": SPOTS,
        "thing": THINGS,
        "device": DEVICES,
        "month": MONTHS,
        "weekday": WEEKDAYS,
    }
    blanks |= {name: rng.choice(words) for name, words in lists.items()}
    year = rng.randrange(1650, 1980)
    blanks |= {"year": year, "year_b": year + rng.randint(30, 90), "day": rng.randint(1, 28)}
    blanks |= {"small": rng.randint(2, 9), "number": rng.randint(10, 400)}
    return blanks


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    args: argparse.Namespace,
    seed: int,
) -> list[str]:
    """Each text with `args.max_new_tokens` sampled tokens after it, none of them special."""
    torch.manual_seed(seed)
    prompts = [tokenizer.bos_token + text for text in texts]
    batch = tokenizer(
        prompts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    tokens = model.generate(
        **batch,
        do_sample=True,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=1.0,
        repetition_penalty=args.repetition_penalty,
        suppress_tokens=sorted(tokenizer.added_tokens_decoder),
        pad_token_id=tokenizer.pad_token_id,
    )
    # The last token may be the beginning of a character.
    return [
        text.rstrip("\ufffd").strip()
        for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ]


def enough_openings(
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> list[str]:
    """As many openings as with their continuations make `args.n_tokens` tokens."""
    texts = []
    n_tokens = 0
    for opening in openings(args.seed):
        if n_tokens >= args.n_tokens:
            break
        texts.append(opening)
        n_tokens += len(tokenizer(opening).input_ids) + args.max_new_tokens
    return texts


def write_texts(
    path: Path,
    texts: Sequence[str],
    settings: dict[str, str],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("text", pa.string())], metadata=settings)
    table = pa.table({"text": list(texts)}, schema=schema)
    scratch = path.with_name(path.name + ".tmp")
    pq.write_table(
        table,
        scratch,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
    )
    scratch.replace(path)  # an interruption leaves the old file or the new one


def read_partial(
    path: Path,
    settings: dict[str, str],
) -> list[str]:
    """Texts of an interrupted run with the same settings; none otherwise."""
    if not path.exists():
        return []
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    file_settings = {key.decode(): value.decode() for key, value in metadata.items()}
    return table["text"].to_pylist() if file_settings == settings else []


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        help=f"default: {DEFAULT_OUTPUT}, with --smoke in the temporary folder",
    )
    parser.add_argument(
        "--n-tokens", type=int, default=210_000, help="tokens in all, openings included"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--max-new-tokens", type=int, default=215, help="tokens after the opening of each document"
    )
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.05, help="1: none, but more loops"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few dozen tokens in two batches")
    args = parser.parse_args()
    if args.smoke:
        args.n_tokens, args.batch_size, args.max_new_tokens = 60, 2, 8
    if args.output is None:
        args.output = (
            Path(tempfile.gettempdir()) / DEFAULT_OUTPUT.name if args.smoke else DEFAULT_OUTPUT
        )
    return args


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    options = {name: value for name, value in vars(args).items() if name not in ("output", "smoke")}
    settings = {"model": EMBEDDED_MODEL, "sampling": json.dumps(options)}
    folder = embedded_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    todo = enough_openings(tokenizer, args)
    partial = args.output.with_suffix(".partial.parquet")
    texts = read_partial(partial, settings)
    with tqdm(
        total=len(todo),
        initial=len(texts),
        desc="Sampling",
        unit="document",
    ) as progress:
        while len(texts) < len(todo):
            batch = todo[len(texts) : len(texts) + args.batch_size]
            texts += continue_texts(model, tokenizer, batch, args, seed=args.seed + len(texts))
            write_texts(partial, texts, settings)
            progress.update(len(batch))
    write_texts(args.output, texts, settings)
    partial.unlink(missing_ok=True)

    n_tokens = sum(len(ids) for ids in tokenizer(texts).input_ids)
    size = args.output.stat().st_size / 1e6
    seconds = time.monotonic() - start
    print(
        f"{args.output}: {len(texts)} documents, {n_tokens} tokens, {size:.2f} MB, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
