"""What a load consists of: prompts that never repeat, models by popularity, arrival times."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice
from random import Random

# Short common words: nearly every tokenizer has one token for each.
WORDS = tuple(
    """
    able about above act add after again age air all also animal answer any apple area arm art ask
    autumn back bad bag ball bank base bear beat bed bell best better big bird black blue board boat
    body bone book both box boy bread bridge bright bring brother brown build burn bus busy buy cake
    call camp car card care cat chair change child city class clean clear clock close cloud coat
    cold color come cook cool copy corn cost country cover cow cross cup cut dance dark day deep
    desk door down draw dream dress drink drive dry duck dust ear early earth east easy eat edge egg
    eight end engine even ever eye face fact fall family far farm fast father feel field fill fire
    first fish five floor flower fly food foot forest forget fork four free fresh friend front fruit
    full game garden gate girl glass go gold good grass gray great green group grow hair half hall
    hand happy hard hat head hear heart heavy help here high hill history hold home hope horse hot
    hour house idea inside iron island jump keep key kind king kitchen knife lake lamp land large
    last late laugh leaf learn leg letter life light line list little long look love low machine
    main map mark market may meal mean meat metal milk mind money month moon more morning mother
    mountain mouth move music name near neck need new next night nine noise north nose note number
    ocean office oil old open orange order page paint pair paper park part party past path pen
    people picture piece place plan plant plate play point poor port pretty price print public pull
    push queen quick quiet rain reach read ready red rest rice rich ride right river road rock roof
    room round rule run safe salt same sand school sea seat second seed seven shape ship shirt shoe
    shop short show side sign silver simple sing sister sit six skin sky sleep slow small smile snow
    soap soft soil song soon sound south space spoon sport spring stand star start station stay step
    stone store storm story street strong sugar summer sun sweet swim table tail talk tall taste
    teach team ten test thing think three time tired today together tomorrow top touch town train
    travel tree trip true try turn twelve two under uncle use valley voice wait walk wall warm wash
    watch water wave way weak wear weather week west wheel white wide wild wind window winter
    woman wood word work world write year yellow yes young
    """.split()  # noqa: SIM905 - lines of words read better than a list
)


class PromptSource:
    """Texts of random words. No text is drawn twice, so no server can answer one from memory."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._drawn = set[str]()

    def draw(self, num_words: int) -> str:
        """A text of ``num_words`` words, or a few more where short ones are used up."""
        words = self._random.choices(WORDS, k=max(1, num_words))
        while (text := " ".join(words)) in self._drawn:
            words.append(self._random.choice(WORDS))
        self._drawn.add(text)
        return text


def draw_models(
    models: Sequence[str], count: int, *, zipf: float | None, random: Random
) -> list[str]:
    """The model of each of ``count`` requests: in turn, or with ``zipf`` = s the r-th of ``models``
    with a probability proportional to 1 / r^s."""
    if zipf is None:
        return list(islice(cycle(models), count))
    weights = list(accumulate((rank + 1) ** -zipf for rank in range(len(models))))
    return random.choices(models, cum_weights=weights, k=count)


def arrival_times(rate: float, *, random: Random) -> Iterator[float]:
    """Seconds from the start at which requests of a Poisson process arrive, ``rate`` per second on
    average; all at 0 for an infinite rate."""
    arrival = 0.0
    while True:
        arrival += random.expovariate(rate)
        yield arrival
