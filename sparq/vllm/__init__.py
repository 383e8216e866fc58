"""SparQ as an attention backend of vLLM: prompts by vLLM's own kernels, decode steps by SparQ's on vLLM's pages.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"sparq": {"ratio": 8}}'

Nothing here is imported by `sparq`; vLLM finds it through `sparq_vllm.register`.
"""
