"""CNN/DailyMail as the SparQ paper ran it.

The rules are those of llminference/tasks/summarisation.py in github.com/graphcore-research/llm-inference-research.
"""

import functools

import datasets
import transformers

SHUFFLE_SEED = 2353669
ARTICLE_CHARACTERS = range(4000, 8001)


def cnn_dailymail(source: dict, tokenizer: str | None = None, pretrained: str | None = None, **_):
    """Documents of sparq_cnn_dailymail, {"test": dataset}: id, article, highlights, tokenizer.

    source: arguments of datasets.load_dataset. tokenizer, pretrained: the model's arguments, which lm-eval hands to its
    tasks; the tokenizer cuts every summary to the length of its reference. Raises ValueError without one, ImportError
    without the package rouge-score.
    """
    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise ValueError(
            "sparq_cnn_dailymail cuts summaries to the reference's number of tokens and needs the model's tokenizer: "
            'name it with --model_args pretrained=... or --metadata \'{"tokenizer": "..."}\''
        )
    # What is missing is missed now, not when everything has been generated.
    load_tokenizer(name)
    rouge_scorer()
    documents = [
        {"id": row["id"], "article": row["article"], "highlights": row["highlights"], "tokenizer": name}
        for row in datasets.load_dataset(**source)["validation"]
        if len(row["article"]) in ARTICLE_CHARACTERS
    ]
    return {"test": datasets.Dataset.from_list(documents).shuffle(seed=SHUFFLE_SEED)}


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """rougeL: F-measure of ROUGE-L, with stemming, of the generation's first tokens: as many as the reference has."""
    (generation,) = results
    tokenizer = load_tokenizer(doc["tokenizer"])
    length = len(tokenizer.encode(doc["highlights"], add_special_tokens=False))
    summary = tokenizer.decode(tokenizer.encode(generation, add_special_tokens=False)[:length])
    return {"rougeL": rouge_scorer().score(doc["highlights"], summary)["rougeL"].fmeasure}


@functools.cache
def load_tokenizer(name: str):
    return transformers.AutoTokenizer.from_pretrained(name)


def rouge_scorer():
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError("sparq_cnn_dailymail needs the package rouge-score: pip install rouge-score") from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
