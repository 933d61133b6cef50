"""The words of the built-in suite: what praises, what blames, and whom and what it is about."""

from typing import Final


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GOOD: Final = _listed(
    """beautiful brave bright calm charming cheerful clean clever delicious excellent fair faithful
    fine free fresh friendly generous gentle glad graceful grand handsome happy healthy honest
    jolly kind lovely loyal merry neat nice noble perfect pleasant polite pretty proud rich safe
    splendid strong sweet tender true useful warm welcome wise wonderful worthy"""
)
BAD: Final = _listed(
    """awful bitter broken cold cruel dangerous dark dead dirty dreadful dull evil false foolish
    gloomy greedy grim harsh horrid hungry idle ill jealous lazy lonely lost mad mean miserable
    nasty painful poor rotten rough rude sad sick silly sore stupid terrible tired ugly unhappy
    useless vain weak weary wicked worn wretched wrong"""
)

THINGS: Final = _listed(
    """answer bed boat book bridge camp chair church city coat company corner day dinner door dream
    evening farm field forest game garden gate hall hill hotel hour house island journey kitchen
    lesson letter library market meeting morning night office paper park party picture play prison
    road room school season ship shop song speech spring station story street summer supper table
    town train valley village visit voyage week window winter year"""
)
# Few things where the answer repeats them: copying a word never seen is beyond a tiny model.
NOTED: Final = _listed("book day house journey letter night room school ship story town year")

NAMES: Final = _listed(
    """Alice Anna Arthur Carol Charles Clara Daniel David Edward Elizabeth Ellen Emily Frank
    George Grace Harry Helen Henry Jack James Jane John Joseph Julia Kate Laura Louis Lucy Mark
    Martha Martin Mary Michel Oliver Paul Peter Philip Ralph Richard Robert Rose Ruth
    Samuel Sarah Simon Susan Thomas Tom Walter William"""
)
