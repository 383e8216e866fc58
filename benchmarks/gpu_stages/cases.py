"""What is measured on a GPU: shapes, goals, and what an H100 was predicted to take."""

from __future__ import annotations

from workload import Case, Shape

S1 = Case("S1", Shape(64, 32, 32, 128, 4096, 32, 128), 3.5, (290, 1430))
S2 = Case("S2", Shape(8, 32, 8, 128, 32768, 32, 256), 4.0, (87, 365))
S3 = Case("S3", Shape(1, 32, 8, 128, 131072, 32, 1024), 3.5, (48, 187))
ONE_ROW = Case("16k", Shape(1, 32, 8, 128, 16384, 32, 256), 1.1, (26, 29))
# The README's rows first, then those of the plugin's own ratio of 8: r = d / 8, k = S / 16.
CASES = (
    S1,
    S2,
    S3,
    Case("4k", Shape(1, 32, 8, 128, 4096, 32, 128)),
    ONE_ROW,
    Case("32k", Shape(1, 32, 8, 128, 32768, 32, 256)),
    Case("16k/8", Shape(1, 32, 8, 128, 16384, 16, 1024)),
    Case("64k/8", Shape(1, 32, 8, 128, 65536, 16, 4096), 2.5, (34, 96)),
    Case("128k/8", Shape(1, 32, 8, 128, 131072, 16, 8192), predicted=(46, 187)),
)
RACES = (S2, S3, ONE_ROW)
PROFILED = (S1, S2, S3, ONE_ROW)

# For a dry run on a CPU: as many branches as can be had of hardly any work.
TINY = (
    Case("tiny, goal", Shape(2, 4, 2, 16, 96, 8, 12), 1.0, (1, 2)),
    Case("tiny", Shape(1, 2, 2, 16, 64, 8, 8)),
)
