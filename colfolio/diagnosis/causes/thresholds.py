"""Where a number begins to mean something: the lines between causes.

They were set on runs of `benchmarks/diagnosis.py --tune`, whose seeds and models are not those that
the published table counts.
"""

# shares of the way from chance (0) to floor (1) that the loss has gone
AT_CHANCE = 0.03
STARTED = 0.10
LEARNT = 0.50
GAINED = 0.03  # between the first steps and the last
SLIGHT = 0.01  # the same, of a loss that still falls

# scores of a query
GONE_SPREAD = 0.10  # of the spread before the first step
FLAT_START = 0.05  # spread over temperature before the first step
STEEP_START = 3.0
SILENT = 1e-4  # gradient over its largest one, that leads out of no collapse
UNSEEN = 0.02  # spread over documents or queries, beside how much the other side differs

# rates
USUAL_UPDATE = 1e-3  # change of a part's weights in a step, over the weights
LEAST_RATE = 1e-8  # where updates are not known
LEAST_UPDATE = 1e-5
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
FEW_CANDIDATES = 7.5  # 8, of which a copy may be masked

# ranking
RANKED = 0.8  # accuracy from which a model ranks well
MOSTLY_RANKED = 0.5
BETTER_RANKED = 0.1  # accuracy gained or lost on the same documents
FORGOTTEN = 0.1  # of the way, that the loss has gone back
SHIFTED = 0.3
LEAST_DOCUMENTS = 12  # of a probe, lest a shift is seen by chance
CONTRADICTED = 1.25  # loss over chance before the first step
CONFIDENT = 0.2  # share of queries that prefer another document by a clear lead
NO_RANK = 0.4  # mean rank over the number of documents; half is chance
SCORE_ERROR = 0.005  # over the spread
ROUGH = 5e-5  # error over the largest score; float32 has 1e-7, fp16 5e-4, bf16 4e-3
SAME_SCORES = 0.5  # share of scores that are distinct, below which they were rounded

# validation
OVER_FITTED = 0.1  # of chance, above the best validation loss so far
BY_HEART = 0.9  # share of the training loss's way
GAP = 0.35  # of the way, that validation is behind
STANDING = 0.02  # of chance, in half of a run

# steps and floors
SLOW_START = 200  # steps for which random weights may stand at chance
NEAR_CHANCE = 0.05  # of chance, for a loss that moves
SKIPPED = 0.1
HIGH_FLOOR = 0.35  # of chance
UNTOLD_FLOOR = 0.7  # where accuracy is not known
NO_ROOM = 0.9
