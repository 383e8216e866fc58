import pytest
from byte_tokenizer import save_byte_tokenizer
from recall_model import BOS, PAD
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["", "The pass key of amber is 48213.\n", " leading", "don't , . stop", "\x00\t\r\n\n\x7f", "é ß 漢字 😀 \u2028"],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_batches_are_padded_left(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch.input_ids == [[PAD, PAD, BOS, 97], [BOS, 97, 98, 99]]
    assert batch.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]
