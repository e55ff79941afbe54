"""Names of records, fields and error codes in messages: server and clients agree."""

ARRAYS = "arrays"
CLASSIFIER = "retrained-classifier"
GRADIENTS = "class-gradients"
CONFIG = "config"
METRICS = "metrics"

PARTITION = "partition-id"
STREAM = "random-stream"
SITE = "site"
ROUND = "server-round"
NUM_EXAMPLES = "num-examples"
PROXIMAL_MU = "proximal-mu"
DISTILLATION_WEIGHT = "distillation-weight"
DISTILLATION_TEMPERATURE = "distillation-temperature"
TEACHER_FINGERPRINT = "teacher-fingerprint"
CODE_FINGERPRINT = "code-fingerprint"
FIELDS = "reply-fields"

# Codes of Flower's errors that clients return; Flower's own are below 1000.
# This client's images cannot be read.
DATA_ERROR = 1001
# The site's own rules refuse the run.
SITE_REFUSES = 1002
DIVERGED = 1003  # the model that was sent, or the training on it, is not finite

# No training brings about larger numbers. Sums, squares and products of those below
# stay finite in float32, so that no reply can leave behind what is not a number.
LARGEST_VALUE = 1e12
# Bytes before an array's values; numpy needs 128 for the names and shapes used here.
LONGEST_HEADER = 256
# BatchNorm's, of which the square root is taken.
VARIANCE = "running_var"
RUNNING_STATISTICS = ("running_mean", VARIANCE)


# Numbers that every train reply carries besides NUM_EXAMPLES and PARTITION.
AVERAGED_METRICS = ("loss", "distillation-loss")
SUMMED_METRICS = (
    "unreadable-images",
    "seconds-data",
    "seconds-gradients",
    "seconds-training",
)

CLASSES = "classes"
RECALL = "recall-"
# Steps in percent to which a site rounds its accuracy on each class.
RECALL_STEP = 5
