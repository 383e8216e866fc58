"""What the recall models share: their vocabulary, and heads that start out looking fixed distances back."""

import torch

BOS, EOS, PAD, VOCAB_SIZE = 256, 257, 258, 260  # a byte is its own token id
HEAD_DIM = 64
MAX_POSITIONS = 8192

# OFFSETS[layer][head]: so many bytes back the head looks at the start of training; the other heads start random.
# After layer 0 a position knows its last 5 bytes, after layer 1 the last 15: a long enough key to find a passage by.
OFFSETS = ((1, 2, 3, 4), (5, 10))
OFFSET_LOGIT = 8.0  # what one pair of rotated components adds to the logit of the position that is looked at
OFFSET_MIN_FREQUENCY = 0.002  # radians a byte; the slower components are left to content


def offset_query_and_key(frequency: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of components, and their values in a query and a key that meet when the key is `offset` bytes back.

    RoPE turns the pair of components i and i + len(frequency) by `frequency[i]` a byte. The query starts out turned
    back by `offset` bytes.
    """
    half, used = len(frequency), int((frequency > OFFSET_MIN_FREQUENCY).sum())
    pairs, phase = torch.arange(used), frequency[:used] * offset
    components = torch.cat([pairs, half + pairs])
    query = torch.cat([torch.cos(phase), -torch.sin(phase)])
    key = torch.cat([torch.ones(used), torch.zeros(used)])
    return components, query, key
