"""Where a number begins to mean something: the lines between causes.

They were set on runs of `benchmarks/diagnosis.py --tune`, whose seeds and models are not those that
the published table counts.
"""

# shares of the way from chance (0) to floor (1) that the loss has gone
AT_CHANCE = 0.03
STARTED = 0.10
LEARNT = 0.50

# scores of a query
GONE_SPREAD = 0.10  # of the spread before the first step
FLAT_START = 0.05  # spread over temperature before the first step
STEEP_START = 3.0
UNSEEN = 0.02  # spread over documents or queries, beside how much the other side differs

# rates
LEAST_UPDATE = 1e-5  # change of a part's weights in a step, over the weights
SMALL_UPDATE = 1e-4  # that leaves vectors where they were
MOST_UPDATE = 0.05  # mean of a part's largest ones
TORN_UPDATE = 0.1
LEAST_DISTANCE = 0.01  # 1 - cosine between vectors now and at the start
SHORT_WARMUP = 0.5  # share of a run that warm-up may take

# data
COPIES = 0.02
MANY_COPIES = 0.2
LEAKED = 0.05
BLANK = 0.2
TRUNCATED = 0.02
OFTEN_TOGETHER = 0.5
TIMES_EXPECTED = 4.0
FEW_CANDIDATES = 8

# ranking
RANKED = 0.8  # accuracy from which a model ranks well
MOSTLY_RANKED = 0.5
SHIFTED = 0.3
LEAST_DOCUMENTS = 12  # of a probe, lest a shift is seen by chance
CONTRADICTED = 1.25  # loss over chance before the first step
SCORE_ERROR = 0.005  # over the spread
ROUGH = 5e-5  # error over the largest score; float32 has 1e-7, fp16 5e-4, bf16 4e-3
SAME_SCORES = 0.5  # share of scores that are distinct, below which they were rounded

# validation
OVER_FITTED = 0.1  # of chance, above the best validation loss so far
BY_HEART = 0.9  # share of the training loss's way
GAP = 0.35  # of the way, that validation is behind
STANDING = 0.02  # of chance, in half of a run

# steps and floors
SKIPPED = 0.1
HIGH_FLOOR = 0.35  # of chance
UNTOLD_FLOOR = 0.7  # where accuracy is not known
NO_ROOM = 0.9
