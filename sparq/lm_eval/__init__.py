"""SparQ and what it competes with in EleutherAI's lm-evaluation-harness: `sparq lm-eval --model sparq ...`."""
