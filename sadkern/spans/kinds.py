"""What a token is trained as, if at all."""

UNSUPERVISED = 0
REASON = 1
ACT = 2

NAMES = {REASON: "REASON", ACT: "ACT"}
