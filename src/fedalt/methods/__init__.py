"""One file per published method; METHODS is the only place that lists them."""

from collections.abc import Mapping

from fedalt.methods.contract import AnyMethod
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import LocalOnly

METHODS: Mapping[str, type[AnyMethod]] = {
    "fedalt": FedALT,
    "fedit": FedIT,
    "local": LocalOnly,
}
