"""Good captions pass, bad ones are refused for the right reason, and repairs lose nothing."""

import pytest

from construction.checks import problem_of, repair
from tests.helpers import ROOT

GOOD = [
    "A young woman with long black hair tied in a ponytail walks forward in a white T-shirt, blue denim shorts and white sneakers, carrying a beige tote bag on her right shoulder.",
    "The man wears a dark blue polo shirt, grey knee-length shorts and black sandals. He has short black hair and glasses, and holds a phone in his left hand.",
    "A tall man in a black down jacket and dark jeans is seen from behind. He carries a red backpack and wears brown leather boots.",
    "This slim elderly woman has short grey hair and wears a purple floral blouse with loose black trousers; she pushes a green shopping cart.",
    "A boy of about ten with a buzz cut runs in an orange basketball jersey with the number 23, black shorts and bright yellow trainers.",
    "The pedestrian appears to be a middle-aged man of heavy build, dressed in a checked shirt in red and white, khaki chinos and worn brown loafers, with a black messenger bag across his chest.",
    "Woman, navy puffer jacket, black leggings, grey trainers, white cap, small pink backpack.",
    'A man in a grey hoodie with the word "GUCCI" on the back, black joggers and white high-top shoes walks away with his hands in his pockets.',
    "A woman wears a beige trench coat over a cream turtleneck, with a plaid scarf, dark tights and ankle boots, and holds a paper cup.",
    "An adult man with a shaved head, a full beard and a tattooed left arm stands in a sleeveless black top, camouflage cargo shorts and flip-flops.",
    "She has shoulder-length brown hair and wears a long red dress with short sleeves and flat silver shoes, and she carries a small black handbag on her forearm.",
    "A man in a black shirt and blue jeans walks towards the camera with a brown leather bag.",
    "A woman in a long red coat and black boots stands with her back to the camera.",
    "A man carries a camera on a strap around his neck and wears a light green shirt, white trousers and brown shoes.",
    "The person is a young man with curly dark hair, wearing a denim jacket over a white T-shirt, black skinny jeans and red canvas shoes; he looks down at his phone while walking.",
    "A short, stout woman in a straw hat and sunglasses wears a sleeveless yellow dress with white dots, and walks in brown sandals.",
    "A woman in a black T-shirt with a picture of a cat on the front, a denim skirt and white socks with black shoes rides an electric scooter.",
    "The man's hair is short and dark. He's wearing a navy blue suit, a light blue shirt without a tie, and polished black shoes.",
    "A teenage girl with a high bun wears an oversized grey sweatshirt and black leggings, and she carries a violin case in her right hand.",
    "A delivery rider in a yellow helmet, a yellow jacket with black sleeves and dark trousers holds two plastic bags with food.",
    "A man pushes a stroller with both hands. He wears a maroon polo, beige shorts, a black belt and white running shoes with blue soles.",
    "A woman with a blue surgical mask and a white sun hat walks under a folded umbrella, in a striped blouse, wide linen trousers and beige slippers.",
    "The pedestrian to look for is a slim young woman, seen from the side.",
    "A man in his sixties with thin white hair wears a padded vest in olive green over a checked shirt, corduroy trousers and grey walking shoes.",
    "A student in a blue and white school uniform with long sleeves, wearing white trainers and a black backpack with a small toy on its zip.",
]

BAD = [
    ("I'm sorry, but I can't help with identifying people in images.", "a refusal"),
    ("I’m sorry, I can’t describe this person in detail for you today.", "a refusal"),
    ("As an AI language model, I do not have access to the picture of a person.", "a refusal"),
    ("Unfortunately there is too little detail to describe the clothes of this person.", "a refusal"),
    ("I cannot identify the person, but they wear a black shirt and blue jeans.", "a refusal"),
    ("Please provide the picture so that I can describe the person in it.", "a refusal"),
    ("Sure! A man in a black shirt and blue jeans walks with a white bag.", "an answer to the prompt"),
    ("Here is the paragraph: a man in a black shirt and blue jeans walks with a bag.", "an answer to the prompt"),
    ("A man in a black shirt and blue jeans walks. Let me know if you need more details.", "an answer to the prompt"),
    ("A man in a black shirt and blue jeans walks along with a bag.<|im_end|>", "an answer to the prompt"),
    ("A man with [colour] hair wears a [colour] shirt and [colour] trousers with black shoes.", "an answer to the prompt"),
    ("The image shows a man with short hair in a black shirt and blue jeans.", "about the picture"),
    ("In this photo, a man with short hair wears a black shirt and blue jeans.", "about the picture"),
    ("A man wears a black shirt and blue jeans, but the picture is blurry.", "about the picture"),
    ("A man in a black shirt and blue jeans stands close to a wall, and the camera is above him.", "about the picture"),
    ("A drone view of a man with a black shirt and blue jeans who carries a bag.", "about the picture"),
    ("A man with a black shirt and blue jeans in the bounding box carries a bag.", "about the picture"),
    ("Seen from above, a man with a black shirt and blue jeans carries a white bag.", "about the picture"),
    ("A man in a black shirt and blue jeans walks, with trees in the background.", "about the picture"),
    ("A low-resolution figure of a man with a black shirt and blue jeans carries a bag.", "about the picture"),
    ("A man wears a black shirt and blue jeans. His shoes are not clearly visible.", "unsure"),
    ("The colour of the hair is unclear, and the person wears a black shirt and jeans.", "unsure"),
    ("It is difficult to tell whether the person wears trousers or a long dark skirt.", "unsure"),
    ("The person, a man or woman of medium build, wears a black shirt and blue jeans.", "unsure"),
    ("Two people walk side by side, one in a black shirt, one in a red dress.", "several people"),
    ("A man in a black shirt and blue jeans walks next to another person in a red dress.", "several people"),
    ("The person on the left wears a black shirt and blue jeans with white shoes.", "several people"),
    ("A group of young men in black shirts and blue jeans walks along with white bags.", "several people"),
    ('{"gender": "male", "upper": "black shirt", "lower": "blue jeans", "shoes": "white"}', "JSON or code"),
    ("```A man with short hair in a black shirt and blue jeans walks with a bag.```", "JSON or code"),
    ("- A man with short hair\n- a black shirt\n- blue jeans and white sneakers", "a list"),
    ("1. Gender: male\n2. Upper body: black shirt\n3. Lower body: blue jeans.", "a list"),
    ("**Clothing**: a man with short hair in a black shirt, **blue** jeans and shoes.", "markdown"),
    ("# Description of a man with short hair in a black shirt and blue jeans.", "markdown"),
    ('"A man in black," says the guard, "with short hair and a blue bag, walks here."', "a quotation"),
    ("A man walks.", "length: 3 words"),
    (" ".join(["A man with short hair in a black shirt and blue jeans walks with a bag."] * 9), "length: 144 words"),
    ("Un hombre con camisa blanca y pantalones negros camina con una mochila roja.", "another language: es"),
    ("Ein Mann mit kurzen schwarzen Haaren trägt ein graues Hemd und eine dunkle Hose.", "another language: de"),
    ("Une femme aux cheveux longs porte une robe rouge et des baskets blanches.", "another language: fr"),
    ("一个 穿着 白色 衬衫 和 黑色 裤子 的 男人 拿着 一个 红色 的 包.", "another language"),
    ("A man wearing a 白色 shirt and black trousers walks with a red bag.", "another language"),
    ("Мужчина с короткими тёмными волосами идёт в чёрной рубашке и синих джинсах.", "another language"),
    ("A man in a black shirt, a black shirt, and a black shirt, and a black shirt.", "repeats itself"),
    ("A man is walking and walking and walking and walking and walking and walking and walking and walking and walking and walking.", "repeats itself"),
    ("A man with short hair wears a black shirt, blue jeans and a pair of", "cut"),
    ("Write one paragraph of plain English about a man who wears a black shirt.", "an answer"),
    ("Gender and rough age; length, colour and style of the hair; build; posture and movement.", "repeats the prompt"),
    ("", "empty"),
    ("...", "length: 0 words"),
    ("A man with a black shirt" + "a" * 300 + " and blue jeans walks with a bag.", "a word that is too long"),
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_a_good_caption_passes_and_is_not_changed(text):
    assert repair(text) == text
    prompt = (ROOT / "configs/construction/prompts/vision.txt").read_text()
    assert problem_of(text, prompt=prompt) == ""


@pytest.mark.parametrize(("text", "problem"), BAD, ids=range(len(BAD)))
def test_a_bad_caption_is_refused_for_its_reason(text, problem):
    prompt = (ROOT / "configs/construction/prompts/vision.txt").read_text()
    assert problem_of(repair(text), prompt=prompt).startswith(problem)


def test_an_answer_that_the_server_cut_or_filtered_is_refused():
    assert problem_of(GOOD[0], "length").startswith("cut")
    assert problem_of(GOOD[0], "content_filter").startswith("a refusal")


@pytest.mark.parametrize(
    "text",
    [
        "  {}\n", '"{}"', "“{}”", "Caption: {}", "**Caption:** {}", "Description:\n\n{}", "'{}'",
        '"Caption: {}"', "**{}**", "`{}`",
    ],
)  # fmt: skip
def test_what_surrounds_a_caption_is_removed(text):
    assert repair(text.format(GOOD[0])) == GOOD[0]


def test_lines_become_one_but_a_list_stays_a_list():
    assert repair("A man\nin a black shirt.\n\nHe walks.") == "A man in a black shirt. He walks."
    assert repair("- a man\n- a shirt") == "- a man\n- a shirt"


def test_quotation_marks_inside_stay():
    text = '"GO" is written on the black shirt of a man who carries a bag with "STOP"'
    assert repair(text) == text
