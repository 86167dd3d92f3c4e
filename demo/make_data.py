"""The demo's data: orders that a small workshop received by e-mail or chat, each as one line for its order book.

    Hi, this is Marta Olsen. Could you send twelve brass hinges to Bergen by Friday? Thanks!
    12 | brass hinges | Marta Olsen | Bergen | Friday

The quantity is in digits, everything else as in the message; `-` stands for what is missing. All orders are invented.
No name, city or item of test.jsonl occurs in train.jsonl, and a third of its examples have phrasings that do not occur there either.

    python demo/make_data.py       # writes train.jsonl and test.jsonl beside this file, the same bytes each time
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SEED = 7
TRAIN_ROWS, SEEN_ROWS, NEW_ROWS = 480, 66, 34  # the test is the last two: phrasings of the training, and new ones
KEEP = 0.7  # how often a template's [optional part] stays
SPELL = 0.5  # how often a quantity that has a word is written as one

SYSTEM = "Write each order as: quantity | item | customer | city | day. Use - for what is missing."
NUMBERS = dict(enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=2))
QUANTITIES = [*range(2, 13)] * 4 + [*range(13, 61), 75, 80, 90, 100, 120, 150, 200, 250, 300, 400, 500]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Words(NamedTuple):
    first: list[str]
    last: list[str]
    cities: list[str]
    items: list[str]


def _list(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(",")]


TRAIN = Words(
    first=_list("""
        Marta, Anna, Peter, Lucas, Emma, Oscar, Nina, Hugo, Clara, Felix, Laura, Simon, Julia, Adam, Elena, David, Sara,
        Martin, Ingrid, Pablo, Rosa, Ivan, Olga, Kenji, Yuki, Omar, Layla, Amir, Priya, Ravi, Mei, Tomas, Petra, Bruno,
        Alice, Victor, Diana, Samuel, Irene, Jonas, Greta, Leo, Maya, Nadia, Karim, Fatima, Hassan, Aisha, Kofi, Amara,
        Chloe, Louis, Paul, Helen, Robert, Ruth, Daniel, Lena, Eric, Monica, Stefan, Teresa, Mateo, Carmen, Joao, Ines,
        Linh, Minh, Arjun, Zofia"""),
    last=_list("""
        Olsen, Berg, Novak, Rossi, Silva, Garcia, Weber, Fischer, Dubois, Moreau, Kowalski, Jansen, Larsen, Lopez, Costa,
        Romano, Keller, Vogel, Bauer, Schmidt, Horvat, Nagy, Popescu, Petrov, Sato, Tanaka, Suzuki, Kim, Park, Chen, Wang,
        Singh, Patel, Gupta, Khan, Rahman, Haddad, Mensah, Okafor, Diallo, Murphy, Walsh, Evans, Hughes, Clark, Turner,
        Parker, Collins, Morris, Reed, Bailey, Cooper, Howard, Ward, Brooks, Bennett, Hayes, Russell, Griffin, Lambert,
        Martel, Simonsen, Virtanen, Nyman, Eklund, Castro, Vargas, Mendez, Rojas, Duarte"""),
    cities=_list("""
        Bergen, Oslo, Lyon, Porto, Turin, Leeds, Ghent, Graz, Basel, Bonn, Malmo, Aarhus, Tampere, Riga, Tallinn, Gdansk,
        Krakow, Prague, Brno, Vienna, Munich, Hamburg, Dresden, Leipzig, Madrid, Seville, Bilbao, Lisbon, Rome, Naples,
        Milan, Athens, Dublin, Glasgow, Bristol, Oxford, Boston, Denver, Dallas, Seattle, Toronto, Montreal, Lima, Quito,
        Bogota, Nairobi, Accra, Lagos, Cairo, Tunis, Ankara, Izmir, Mumbai, Delhi, Pune, Tokyo, Kyoto, Osaka, Seoul, Hanoi,
        Manila, Perth, Auckland, Cape Town, New York, Buenos Aires, San Diego, Le Havre, Las Palmas, Novi Sad"""),
    items=_list("""
        brass hinges, oak shelves, steel brackets, copper pipes, leather belts, wool blankets, glass jars, clay pots,
        paper lanterns, pine boards, linen napkins, iron hooks, cotton aprons, ceramic mugs, wooden spoons, round tables,
        small drawers, large crates, white candles, black coats, red cushions, blue bowls, door handles, picture frames,
        garden chairs, bike baskets, coat racks, window latches, cabinet knobs, table legs, bed slats, bread knives,
        soup plates, tea towels, key rings, bird houses, flower boxes, wall clocks, desk lamps, floor tiles, curtain rods,
        chair seats, tool bags, saw blades, paint brushes, wood screws, copper nails, steel washers, ladders, buckets,
        stools, benches, trays, mirrors, candle holders, lamp shades, door stops, shirt buttons, bottle openers,
        letter openers, coffee cups, hand saws, work gloves, phone cases, book ends, wine racks, fire baskets, plant labels,
        seed trays, shop signs, stair rails, bath mats, rope swings, bow ties, pencil boxes, axe handles, milk jugs,
        small oak boxes, solid brass locks, black leather wallets, large glass vases, white paper bags, red wool scarves,
        blue linen shirts, long steel chains, round copper pans, old iron gates, white door signs, soft cotton towels,
        heavy work boots, clear glass beads, thin pine strips, long table runners, dark oak stools, small clay figures"""),
)
TEST = Words(
    first=_list("""
        Astrid, Marco, Hannah, Viktor, Lucia, Anton, Beata, Cedric, Dora, Emil, Fiona, Gustav, Hilda, Igor, Jasmine,
        Kirsten, Lars, Miriam, Noah, Olivia, Pedro, Quentin, Rachel, Sven, Tariq, Ursula, Vera, Walter, Yasmin, Zane, Akira,
        Bianca, Carlos, Deepa, Farid, Gloria"""),
    last=_list("""
        Andersen, Bianchi, Carlsen, Delgado, Eriksen, Ferrari, Gomez, Hansen, Ivanov, Jensen, Kaplan, Lehmann, Marino,
        Nakamura, Ortiz, Pereira, Quinn, Richter, Santos, Thomsen, Ueda, Vasquez, Wagner, Yilmaz, Zimmer, Abbott, Barnes,
        Crawford, Dixon, Fletcher, Gibson, Harper, Ibrahim, Joshi, Kumar, Lindgren"""),
    cities=_list("""
        Antwerp, Bremen, Cologne, Geneva, Zurich, Nantes, Toulouse, Valencia, Verona, Genoa, Zagreb, Budapest, Vilnius,
        Turku, Uppsala, Odense, Stavanger, Utrecht, Brighton, Cardiff, Belfast, Chicago, Houston, Portland, Ottawa, Calgary,
        Rabat, Dakar, Kampala, Jakarta, Bangkok, Chennai, Nagoya, Brisbane, Los Angeles, Hong Kong"""),
    items=_list("""
        walnut stands, bronze bells, silk ribbons, canvas sacks, tin lids, bamboo screens, marble slabs, felt slippers,
        cork stoppers, rubber gaskets, enamel pitchers, maple chopping blocks, green umbrellas, grey carpets, yellow flags,
        wide planks, fence posts, roof panels, kitchen scales, shoe horns, guitar straps, dog collars, horse saddles,
        oil filters, fishing nets, cable ducts, pillow covers, cheese graters, salt shakers, tent pegs, boat oars,
        toy trains, notebooks, chisels, hammers, magnets, hollow metal tubes, short bronze pins, wide canvas straps,
        tall walnut easels"""),
)

# {n} is the quantity in digits, {q} in digits or as a word, {Q} the same where a sentence begins.
SEEN = """
Hi, this is {name}. Could you send {q} {item} to {city}[ by {day}]? Thanks!
Hello, please send {q} {item} to {city}[ by {day}]. Regards, {name}
Good morning, I would like to order {q} {item}[ for {day}]. Please ship to {city}. Best, {name}
Dear team, {name} here. We need {q} {item} in {city}[ by {day}].
My name is {name} and I need {q} {item}[ by {day}]. Please deliver to {city}.
{Q} {item} to {city}[ by {day}], please.[ — {name}]
Order from {name}: {q} {item}[, due {day}][, ship to {city}].
hey, can i get {q} {item} sent to {city}[ by {day}]? thx, {name}
hi it's {name}, need {q} {item}[ by {day}], i'll pick them up
Hello! I'd like {q} {item}, please. I will collect them[ on {day}]. {name}
{name}, {city}: {n} {item}[, {day}].
{city}, {day}: {n} x {item} for {name}.
{item}, {n} pieces, for {name} in {city}[, by {day}]
Please put me down for {q} {item}[ for {day}]. I'll come by the shop. Thanks, {name}
Could {q} {item} reach {city} before {day}?[ Yours, {name}]
We are out of {item}. Please send {q} to {city}[ by {day}].[ {name}]
I need {item} again: {q} this time, to {city}[ by {day}]. Cheers, {name}
Deliver {q} {item} to {name} in {city}[ on {day}].
{name} wants {q} {item}[ by {day}]. Ship them to {city}.
{name} in {city} asks for {q} {item}[, delivered by {day}].
new order: {n} {item}, {city}[, {day}], {name}
For {day}: {q} {item}, please. Send to {city}. Kind regards, {name}
By {day} I need {q} {item} here in {city}. Thank you, {name}
On {day} I will pick up {q} {item} at your shop. {name}
Please reserve {q} {item} for {name}; pick-up is on {day}.
Can you make {q} {item} for me[ by {day}]? I am in {city}. — {name}
This is {name} from {city}. I'd like {q} {item}[ by {day}].
hello, {name} again, {q} {item} to {city} please[, {day} is fine]
Hi there, do you have {q} {item}? If so, send them to {city}[ by {day}]. {name}
Quick order: {q} {item}. Name: {name}. City: {city}.[ Day: {day}.]
Customer {name}, {n} {item}[, needed on {day}]. No delivery, pick-up.
To {city}[ by {day}]: {q} {item}. Bill to {name}.
Good evening, {q} {item} please, delivered to {city}[ on {day}]. Greetings, {name}
Our shop in {city} needs {q} {item}[ by {day}]. Best wishes, {name}
would like {q} {item}[ for {day}], picking up myself, {name}
yo, {q} {item} to {city}[ by {day}] pls[ - {name}]
Hi, {name} speaking. I'd like to order {q} {item}[ by {day}] and will fetch them myself.
Please send me {item}, {q} in all[, no later than {day}]. Address: {city}. {name}
I'm writing for {name} in {city}: we need {q} {item}[ by {day}].
Sorry for the rush: {q} {item} to {city} by {day}, please! {name}
No rush: {q} {item} to {city} whenever you can.[ {name}]
Is it possible to get {q} {item}[ by {day}]? Delivery to {city}. Many thanks, {name}
{name} here, same as always: {q} {item} to {city}[, {day}].
pls ship {n} {item} to {city}[ on {day}], {name}
Attention workshop: {q} {item} due in {city}[ on {day}]. Signed, {name}
order {n} {item} / {name} / {city}[ / {day}]
name: {name}, item: {item}, qty: {n}[, city: {city}][, day: {day}]
Hello, I saw your {item} and want {q}. Please post them to {city}[ by {day}]. {name}
Your {item} are great! Send {q} to {city}[ by {day}], please. Thanks again, {name}
Please add {q} {item} to the van to {city}[ on {day}].[ {name}]
Hi! {name} would like {q} {item}[ by {day}], to be collected at the shop.
Morning! Can {name} pick up {q} {item}[ on {day}]?
Dear Sir or Madam, kindly deliver {q} {item} to {city}[ by {day}]. Sincerely, {name}
I'd be glad to get {q} {item}[ by {day}]. Yours truly, {name}, {city}
need {q} {item} in {city} asap. {name}
The school in {city} needs {q} {item}[ before {day}]. Contact: {name}.
Let me have {q} {item}, please[, by {day} if possible]. {name}, {city}
{day} delivery to {city}, please: {q} {item}. Regards, {name}
It's {name}. {Q} {item}[ by {day}], and I'll come and get them.
Could you set aside {q} {item}? I'll be there on {day}. {name}
hi, {q} {item} pls, to {city}[, need them {day}]
Please deliver on {day}: {q} {item} to {city}. Ordered by {name}.
We'd love {q} {item} for our cafe in {city}[ by {day}]. {name}
{name} ({city}): please send {q} {item}[ by {day}].
""".strip().splitlines()
NEW = """
Greetings from {city}! I'm after {q} {item}[, ideally by {day}]. — {name}
Hope you are well. We would be happy with {q} {item} in {city}[ by {day}]. Warmly, {name}
{name} asked me to order {q} {item}[ for {day}]. They go to {city}.
Any chance of {q} {item} before {day}? I'd pick them up myself. Thanks, {name}
Running low on {item}, so please dispatch {q} to {city}[ by {day}]. {name}
{day} works best for me. {Q} {item}, sent to {city}. Cheers, {name}
{n} pcs {item} - {name} - {city}[ - {day}]
hiya, could u post {q} {item} to {city}[ before {day}]?[ ta, {name}]
I have a job in {city}[ on {day}] and will need {q} {item}. {name}
Purchase request by {name}: {q} {item}, destination {city}[, deadline {day}].
Put {q} {item} on my account, please. I'll stop by[ on {day}]. Yours, {name}
Would you bring {q} {item} to {city}[ on {day}]? Ask for {name}.
Ref. {name}: send out {q} {item}[ on {day}], {city}.
Please prepare {q} {item}. {name} will collect them[ on {day}].
great work last time! now {q} {item} to {city}[ by {day}], {name}
If you can, get {q} {item} to us in {city} by {day}. All the best, {name}
From: {name}. To: {city}. Goods: {q} {item}.[ Due: {day}.]
Kindly arrange {q} {item}[ by {day}] at our site in {city}. Thank you. {name}
We'll be open on {day}, so bring {q} {item} to {city} then.[ {name}]
let's say {q} {item} in {city}[ by {day}], it's all for {name}
""".strip().splitlines()


class Order(NamedTuple):
    message: str
    line: str


def make() -> tuple[list[Order], list[Order]]:
    """The training orders and the test orders."""
    rng = random.Random(SEED)
    train = _orders(rng, SEEN, TRAIN, TRAIN_ROWS)
    test = _orders(rng, SEEN, TEST, SEEN_ROWS) + _orders(rng, NEW, TEST, NEW_ROWS)
    rng.shuffle(test)
    return train, test


def _orders(rng: random.Random, templates: Sequence[str], words: Words, count: int) -> list[Order]:
    """Different messages in random order, each template used about equally often."""
    turns = rng.sample(templates, len(templates))
    orders: dict[str, Order] = {}
    while len(orders) < count:
        order = _order(rng, turns[len(orders) % len(turns)], words)
        orders.setdefault(order.message, order)
    return rng.sample(list(orders.values()), count)


def _order(rng: random.Random, template: str, words: Words) -> Order:
    template = re.sub(r"\[(.*?)\]", lambda part: part[1] if rng.random() < KEEP else "", template)
    quantity = rng.choice(QUANTITIES)
    fields = {
        "item": rng.choice(words.items),
        "name": f"{rng.choice(words.first)} {rng.choice(words.last)}",
        "city": rng.choice(words.cities),
        "day": rng.choice(DAYS),
    }
    written = _written(rng, quantity)
    message = template.format(n=quantity, q=written, Q=written[0].upper() + written[1:], **fields)
    said = [value if f"{{{field}}}" in template else "-" for field, value in fields.items()]
    return Order(message, " | ".join([str(quantity), *said]))


def _written(rng: random.Random, quantity: int) -> str:
    if quantity not in NUMBERS or rng.random() >= SPELL:
        return str(quantity)
    return "a dozen" if quantity == 12 and rng.random() < 0.5 else NUMBERS[quantity]


def jsonl(orders: Sequence[Order]) -> str:
    text = ""
    for order in orders:
        said = {"system": SYSTEM, "user": order.message, "assistant": order.line}
        row = {"messages": [{"role": role, "content": content} for role, content in said.items()]}
        text += json.dumps(row, ensure_ascii=False) + "\n"
    return text


if __name__ == "__main__":
    for name, orders in zip(("train", "test"), make(), strict=True):
        Path(__file__).with_name(f"{name}.jsonl").write_text(jsonl(orders), encoding="utf-8", newline="\n")
