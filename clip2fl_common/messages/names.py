"""Names of records, fields and error codes in messages, for server and clients."""

from clip2fl_common.metrics import DISCRIMINANT_HEAD, RETRAINED_HEAD

ARRAYS = "arrays"
CLASSIFIER = "retrained-classifier"
GRADIENTS = "class-gradients"
CLASS_STATISTICS = "class-statistics"
MOMENTS = "class-moments"
CONFIG = "config"
METRICS = "metrics"
SECURE = "secure-aggregation"
MASKED = "masked-sums"
# Records of the heads that a request for evaluation holds.
HEAD_RECORDS = {
    RETRAINED_HEAD: CLASSIFIER,
    DISCRIMINANT_HEAD: "discriminant-classifier",
}

PARTITION = "partition-id"
STREAM = "random-stream"
SITE = "site"
IN_CARD = "listed-in-card"
VERSIONS = "versions"
ROUND = "server-round"
NUM_EXAMPLES = "num-examples"
PROXIMAL_MU = "proximal-mu"
DISTILLATION_WEIGHT = "distillation-weight"
DISTILLATION_TEMPERATURE = "distillation-temperature"
TEACHER_FINGERPRINT = "teacher-fingerprint"
CODE_FINGERPRINT = "code-fingerprint"
FIELDS = "reply-fields"

# Codes of errors that clients return; Flower's own codes are below 1000.
# The client cannot read its images.
DATA_ERROR = 1001
# The site's own rules refuse the run.
SITE_REFUSES = 1002
DIVERGED = 1003  # the received model, or the training on it, is not finite

# No training makes larger numbers. Sums, squares and products of numbers below stay
# finite in float32, so no reply can make the server's state infinite or NaN.
LARGEST_VALUE = 1e12
# Most seconds that a client may say its work took, 116 days. Sums over 10,000 clients
# stay readable in the run's files.
MOST_SECONDS = 1e7
# Most bytes before an array's values. Numpy needs 128 for the names and shapes here.
LONGEST_HEADER = 256
# BatchNorm's variance: its square root is taken, so it must not be negative.
VARIANCE = "running_var"
RUNNING_STATISTICS = ("running_mean", VARIANCE)


# Metrics that every train reply has besides NUM_EXAMPLES and PARTITION.
AVERAGED_METRICS = ("loss", "distillation-loss")
CLIENT_SECONDS = ("seconds-data", "seconds-gradients", "seconds-training")
"""A client's own measurement of its work."""
SUMMED_METRICS = ("unreadable-images", *CLIENT_SECONDS)

CLASSES = "classes"
RECALL = "recall-"
# A site's own measurements of an evaluation.
EVALUATION_SECONDS = "seconds-evaluation"
EVALUATION_UNREADABLE = "unreadable-images"
# In an evaluation request: whether the server asks for a confusion matrix. In a reply:
# the record with the matrix, if the site's policy allows it.
CONFUSION = "confusion"
# Steps in percent to which a site rounds its accuracy on each class.
RECALL_STEP = 5
