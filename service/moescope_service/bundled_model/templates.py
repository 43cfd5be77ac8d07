"""The sentences of the word problems: what `problems` fills in with words and numbers.

``[a|b]`` is a choice, ``{name}`` a word from `words` (``{name2}`` is another one), ``{he}``,
``{his}`` and ``{him}`` refer to ``{name}``, ``{a}`` is a number and ``{a + b = x}`` a step of the
worked solution. A number that multiplies or divides is small; the last step's result is the answer.
"""

from typing import NamedTuple


class Template(NamedTuple):
    """One kind of problem."""

    question: str
    solution: str


TEMPLATES = (
    # Having, giving and sharing.
    Template(
        "{name} has {a} {toy}. {name2} gives {him} {b} more. "
        "How many {toy} does {name} have [now|in all]?",
        "{name} has {a + b = x} {toy}.",
    ),
    Template(
        "{name} has {a} {toy} and {name2} has {b} {toy}. They put them together and then "
        "[lose|give away] {c}. How many {toy} are left?",
        "Together they have {a + b = x} {toy}. Then {x - c = y} are left.",
    ),
    Template(
        "{name} has {a} {toy}. {name2} has {b} times as many. "
        "How many {toy} do they have [together|in total]?",
        "{name2} has {a * b = x} {toy}. Together they have {a + x = y}.",
    ),
    Template(
        "{name} has {a} {toy} and {name2} has {b} more than {name}. "
        "How many {toy} do the two have together?",
        "{name2} has {a + b = x} {toy}. Together they have {a + x = y}.",
    ),
    Template(
        "{name} has {a} {toy}. {name2} has {b} fewer. How many {toy} do they have in all?",
        "{name2} has {a - b = x} {toy}. In all they have {a + x = y}.",
    ),
    Template(
        "{name} shares {a} {snack} equally among {b} friends. "
        "How many {snack} does each friend get?",
        "Each friend gets {a / b = x} {snack}.",
    ),
    Template(
        "{name} bakes {a} {snack} and eats {b} of them. The rest is shared equally by {c} friends. "
        "How many {snack} does each friend get?",
        "{name} has {a - b = x} {snack} to share. Each friend gets {x / c = y}.",
    ),
    Template(
        "{name} has {a} {fruit} and {b} {fruit2}. {He} shares all the fruit equally "
        "[between|among] {c} people. How many pieces does each person get?",
        "There are {a + b = x} pieces of fruit. Each person gets {x / c = y}.",
    ),
    Template(
        "{name} had some {toy}. After [giving|lending] {a} to {his} {relative}, {he} has {b} left. "
        "How many {toy} did {name} have at first?",
        "At first {name} had {a + b = x} {toy}.",
    ),
    Template(
        "{name} keeps {his} {toy} in {a} {box} with {b} in each. "
        "{He} gives {c} {toy} to {name2}. How many {toy} does {name} still have?",
        "{name} has {a * b = x} {toy}. After the gift {he} has {x - c = y}.",
    ),
    # Shopping and money.
    Template(
        "{name} buys {a} {supply} for {b} dollars each. How many dollars does {he} [pay|spend]?",
        "{name} pays {a * b = x} dollars.",
    ),
    Template(
        "{name} buys {a} {supply} at {b} dollars each and a bag for {c} dollars. "
        "What is the total cost in dollars?",
        "The {supply} cost {a * b = x} dollars. The total is {x + c = y} dollars.",
    ),
    Template(
        "{name} has {a} dollars. {He} buys a book for {b} dollars and a toy for {c} dollars. "
        "How much money does {name} have left?",
        "{name} spends {b + c = x} dollars. {He} has {a - x = y} dollars left.",
    ),
    Template(
        "{name} earns {a} dollars an hour and works {b} hours on {day}. "
        "{He} spends {c} dollars on [lunch|a ticket]. How many dollars remain?",
        "{name} earns {a * b = x} dollars. After spending, {x - c = y} dollars remain.",
    ),
    Template(
        "A shop sells {garment} for {a} dollars each. On {day} it sells {b} of them "
        "and on {day2} it sells {c}. How many dollars does the shop take in?",
        "The shop sells {b + c = x} {garment}. It takes in {x * a = y} dollars.",
    ),
    Template(
        "{name} pays {a} dollars for {b} {garment} that all cost the same. "
        "What is the price of one in dollars?",
        "One costs {a / b = x} dollars.",
    ),
    Template(
        "{name} saves {a} dollars every week for {b} weeks. {His} {relative} adds {c} dollars. "
        "How many dollars does {name} have?",
        "{name} saves {a * b = x} dollars. With the gift {he} has {x + c = y}.",
    ),
    Template(
        "{name} wants a bike that costs {a} dollars. {He} has {b} dollars and saves {c} dollars a "
        "week. How many weeks does {he} need?",
        "{name} still needs {a - b = x} dollars. That takes {x / c = y} weeks.",
    ),
    Template(
        "A jacket costs {a} dollars and a hat costs {b} dollars less. "
        "How much do [both|the two] cost together?",
        "The hat costs {a - b = x} dollars. Together they cost {a + x = y} dollars.",
    ),
    Template(
        "{name} sells {a} {fruit} for {b} dollars each and {c} {crop} for {d} dollars each. "
        "How many dollars does {he} make?",
        "The {fruit} bring {a * b = x} dollars. The {crop} bring {c * d = y} dollars. "
        "In total that is {x + y = z}.",
    ),
    Template(
        "Tickets cost {a} dollars for adults and {b} dollars for children. "
        "A family buys {c} adult tickets and {d} child tickets. What do they pay in dollars?",
        "The adult tickets cost {c * a = x} dollars. The child tickets cost {d * b = y} dollars. "
        "They pay {x + y = z}.",
    ),
    # Farm and garden.
    Template(
        "A farmer has {a} {animal} and {b} {animal2}. {He} sells {c} of the animals. "
        "How many animals are left?",
        "There are {a + b = x} animals. After the sale {x - c = y} are left.",
    ),
    Template(
        "{name} plants {a} rows of {crop} with {b} plants in each row. "
        "[Rabbits|Birds|Snails] eat {c} plants. How many plants are left?",
        "{name} plants {a * b = x} {crop}. Then {x - c = y} are left.",
    ),
    Template(
        "{name} picks {a} {fruit} in the morning and {b} in the afternoon. {He} packs them into "
        "{box} of {c}. How many {box} does {he} fill?",
        "{name} picks {a + b = x} {fruit}. {He} fills {x / c = y} {box}.",
    ),
    Template(
        "Each hen lays {a} eggs a week. How many eggs do {b} hens lay in {c} weeks?",
        "In one week they lay {a * b = x} eggs. In all they lay {x * c = y} eggs.",
    ),
    Template(
        "A farm has {a} {animal}. {b} of them are in the barn and the rest are in {c} equal "
        "groups in the field. How many {animal} are in each group?",
        "In the field are {a - b = x} {animal}. Each group has {x / c = y}.",
    ),
    Template(
        "{name} plants {a} {flower} and twice as many {flower2}. "
        "How many flowers does {he} plant in all?",
        "{name} plants {a * 2 = x} {flower2}. In all {he} plants {a + x = y} flowers.",
    ),
    Template(
        "A garden has {a} {flower} and {b} {flower2}. {name} picks {c} of them on {day} and {d} on "
        "{day2}. How many flowers are still in the garden?",
        "The garden has {a + b = x} flowers. {name} picks {c + d = y}. Then {x - y = z} are left.",
    ),
    Template(
        "There are {a} {fruit} on a tree. The wind blows down {b} and {name} picks half of the "
        "rest. How many {fruit} does {name} pick?",
        "After the wind there are {a - b = x} {fruit}. {name} picks {x / 2 = y}.",
    ),
    Template(
        "A farmer fills {a} {box} with {b} {crop} each and has {c} {crop} left over. "
        "How many {crop} are there?",
        "In the {box} are {a * b = x} {crop}. In all there are {x + c = y}.",
    ),
    # School and books.
    Template(
        "A class has {a} girls and {b} boys. They form teams of {c}. How many teams are there?",
        "The class has {a + b = x} children. They form {x / c = y} teams.",
    ),
    Template(
        "A school has {a} classrooms with {b} desks in each. {c} desks are [broken|empty]. "
        "How many desks are [fine|in use]?",
        "There are {a * b = x} desks. Without the others {x - c = y} remain.",
    ),
    Template(
        "{name} reads {a} pages a day for {b} days. The book has {c} more pages. "
        "How many pages does the book have?",
        "{name} reads {a * b = x} pages. The book has {x + c = y} pages.",
    ),
    Template(
        "A book has {a} pages. {name} has read {b} pages and reads {c} pages a day from now on. "
        "In how many days will {he} finish?",
        "There are {a - b = x} pages left. {name} needs {x / c = y} days.",
    ),
    Template(
        "A teacher has {a} {supply}. {He} gives {b} {supply} to each of {c} children. "
        "How many {supply} does the teacher keep?",
        "The children get {b * c = x} {supply}. The teacher keeps {a - x = y}.",
    ),
    Template(
        "{name} scores {a} points in the first test, {b} in the second and {c} in the third. "
        "How many points is that in all?",
        "After two tests {name} has {a + b = x} points. In all {he} has {x + c = y}.",
    ),
    Template(
        "A library has {a} shelves with {b} books each. {name} brings {c} new books. "
        "How many books does the library have now?",
        "The shelves hold {a * b = x} books. Now there are {x + c = y} books.",
    ),
    Template(
        "{name} solves {a} exercises on {day} and {b} fewer on {day2}. "
        "How many exercises does {he} solve in the two days?",
        "On {day2} {name} solves {a - b = x} exercises. In two days {he} solves {a + x = y}.",
    ),
    Template(
        "{a} children go on a [trip|hike]. {b} of them walk and the others ride in {c} cars with "
        "the same number in each. How many children ride in each car?",
        "In the cars are {a - b = x} children. Each car has {x / c = y}.",
    ),
    # Travel and time.
    Template(
        "{name} drives {a} miles on {day} and {b} miles on {day2}. "
        "How many miles is that [altogether|in total]?",
        "{name} drives {a + b = x} miles.",
    ),
    Template(
        "A ship goes {a} miles an hour. How far does it go in {b} hours?",
        "It goes {a * b = x} miles.",
    ),
    Template(
        "{name} has to walk {a} miles. {He} walks {b} miles a day for {c} days. "
        "How many miles are left?",
        "{name} walks {b * c = x} miles. There are {a - x = y} miles left.",
    ),
    Template(
        "A bus has {a} people on it. At the first stop {b} get off and {c} get on. "
        "How many people are on the bus now?",
        "After {b} get off there are {a - b = x} people. Now there are {x + c = y}.",
    ),
    Template(
        "{name} rides {a} miles to {his} {relative} and the same way back, {b} times a month. "
        "How many miles is that?",
        "One trip is {a * 2 = x} miles. In a month it is {x * b = y} miles.",
    ),
    Template(
        "{name} practices piano for {a} minutes on {day} and {b} minutes on {day2}. {name2} "
        "practices {c} minutes [less|fewer] in total. How many minutes does {name2} practice?",
        "{name} practices {a + b = x} minutes. {name2} practices {x - c = y} minutes.",
    ),
    Template(
        "A boat carries {a} people a trip. How many trips does it take to bring {b} adults and "
        "{c} children over the river?",
        "There are {b + c = x} people. It takes {x / a = y} trips.",
    ),
    Template(
        "{name} is {a} years old. {His} {relative} is {b} times as old. "
        "How old will the {relative} be in {c} years?",
        "The {relative} is {a * b = x} years old. In {c} years that will be {x + c = y}.",
    ),
    Template(
        "{name} is {a} years old and {name2} is {b} years younger. What is the sum of their ages?",
        "{name2} is {a - b = x} years old. The sum is {a + x = y}.",
    ),
    # Kitchen.
    Template(
        "A recipe needs {a} eggs for one cake. {name} bakes {b} cakes and has {c} eggs. "
        "How many eggs are left?",
        "The cakes need {a * b = x} eggs. There are {c - x = y} left.",
    ),
    Template(
        "{name} bakes {a} trays of {b} {snack}. {His} family eats {c} and {name2} eats {d}. "
        "How many {snack} are left?",
        "{name} bakes {a * b = x} {snack}. They eat {c + d = y}. So {x - y = z} are left.",
    ),
    Template(
        "{name} cuts {a} pizzas into {b} slices each. {c} people share all the slices equally. "
        "How many slices does each one get?",
        "There are {a * b = x} slices. Each one gets {x / c = y}.",
    ),
    Template(
        "A jar holds {a} {snack}. {name} eats {b} each day for {c} days. "
        "How many {snack} are still in the jar?",
        "{name} eats {b * c = x} {snack}. Still in the jar are {a - x = y}.",
    ),
    Template(
        "{name} makes {a} cups of tea and {b} cups of juice for a party. "
        "The guests drink {c} cups. How many cups are left?",
        "{name} makes {a + b = x} cups. Then {x - c = y} are left.",
    ),
    # Sports, crafts and nature.
    Template(
        "A team scores {a} points in each of {b} games and {c} points in the last game. "
        "What is the total score?",
        "In the first games the team scores {a * b = x} points. The total is {x + c = y}.",
    ),
    Template(
        "{name} runs {a} laps and {name2} runs {b} laps more. {name3} runs half as many laps as "
        "{name2}. How many laps does {name3} run?",
        "{name2} runs {a + b = x} laps. {name3} runs {x / 2 = y} laps.",
    ),
    Template(
        "{name} catches {a} {fish}, {name2} catches {b} and {name3} catches {c}. They let {d} go. "
        "How many {fish} do they keep?",
        "{name} and {name2} catch {a + b = x} {fish}. With {name3} it is {x + c = y}. "
        "They keep {y - d = z}.",
    ),
    Template(
        "{name} has {a} feet of rope. {He} cuts off {b} feet and cuts the rest into pieces of {c} "
        "feet. How many pieces does {he} get?",
        "There are {a - b = x} feet left. That makes {x / c = y} pieces.",
    ),
    Template(
        "{name} needs {a} beads for one necklace and makes {b} necklaces. {He} has {c} beads. "
        "How many more beads does {he} need?",
        "{name} needs {a * b = x} beads. So {he} needs {x - c = y} more.",
    ),
    Template(
        "A pond has {a} ducks. {b} more land on the water and then half of all the ducks fly away. "
        "How many ducks are left?",
        "There are {a + b = x} ducks. Then {x / 2 = y} are left.",
    ),
    Template(
        "A zoo has {a} cages with {b} birds in each and {c} birds in the garden. {d} birds are "
        "moved to another zoo. How many birds stay?",
        "In the cages are {a * b = x} birds. In all there are {x + c = y}. So {y - d = z} stay.",
    ),
    Template(
        "{name} builds {a} towers of {b} blocks. {name2} builds {c} towers of {d} blocks. "
        "How many more blocks does {name} use than {name2}?",
        "{name} uses {a * b = x} blocks. {name2} uses {c * d = y}. The difference is {x - y = z}.",
    ),
    Template(
        "A tank holds {a} gallons of water. Each day {b} gallons are used and the tank was full "
        "{c} days ago. On {day} {name} adds {d} gallons. How many gallons are in it now?",
        "In {c} days {b * c = x} gallons are used. That leaves {a - x = y}. Now there are "
        "{y + d = z} gallons.",
    ),
)
