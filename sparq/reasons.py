"""Why a step was dense: what reports and warnings say. A compiled graph can count these only, which are known before.

The one that names a type of cache layer is made where it is found; a graph counts it as OTHER_REASON.
"""

from sparq_kernels.arguments import MAX_QUERY_LENGTH

OTHER_REASON = "another reason (the step ran in a compiled graph)"
SLIDING = "sliding-window layer"
TOO_MANY = f"more than {MAX_QUERY_LENGTH} new tokens at once"
FIRST_LAYERS = "one of the first dense_layers"
DTYPES_DIFFER = "query, key and value differ in dtype"
SHAPES_DIFFER = "keys and values differ in shape"
DROPOUT = "attention dropout"
POSITION_BIAS = "attention with position_bias"
WEIGHTS_WANTED = "attention weights were asked for"
TOO_SHORT = "shorter than min_length"
COVERED = "k covers the context"
FOREIGN_CACHE = "there is no cache of transformers"
NO_CACHE = "there is no cache (use_cache=False)"
EMPTY_CACHE = "the model left its cache empty (as it does with gradient checkpointing in training mode)"
NO_KERNEL = (
    "this device has no kernel, and plain PyTorch is slower than dense attention (SPARQ_BACKEND=reference runs it)"
)
UNSEEN = "the cache was not seen before this step"
MADE_IN_GRAPH = "the cache was first used in a compiled graph"
OFFLOADED = "an offloaded cache cannot be read sparsely"
OTHER_KEYS = "attention to other keys and values than the cached ones cannot be read sparsely"
MASK_SHAPE = "attention mask that is not [batch, 1, queries, length]"
MASK_BIAS = "attention mask with a bias"
MASK_ORDER = "attention mask that is not causal"

REASONS = tuple(reason for name, reason in list(globals().items()) if name.isupper() and isinstance(reason, str))
# Of some layers or some passes only, and nothing to warn of.
EXPECTED = {SLIDING, TOO_MANY, FIRST_LAYERS, UNSEEN}
