"""One file per published method, or per family of them; METHODS alone lists them."""

from collections.abc import Mapping

from fedalt.methods.contract import AnyMethod
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import LocalOnly

# Every method with its defaults. Where several are settings of one class, its field `variant`
# tells them apart, and nothing else sets that.
METHODS: Mapping[str, AnyMethod] = {
    "fedalt": FedALT(),
    "fedit": FedIT(),
    "local": LocalOnly(),
}
