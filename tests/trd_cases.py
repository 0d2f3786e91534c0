"""What tests of topd.trd share: a tokenizer whose tokens are characters, problems, and functions as generators."""

from tiny_models import transformers

from topd.trd import generate, read_run

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking is false %}<nothink> {% endif %}{% endif %}"
)


def character_tokenizer(chat: bool = True):
    """Return a tokenizer with a token for each character; the first four ids are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side="left"
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


TOKENIZER = character_tokenizer()

PROBLEMS = [
    {"id": f"p{number}", "problem": f"{number} + 1?", "reference": f"It is {number + 1}.", "sum": number + 1}
    for number in range(6)
]


def student(request):
    """Answer rightly for even numbers."""
    number = int(request.prompt.text.split(" ")[0])
    return f"It is {number + 1 if number % 2 == 0 else 99}."


def teacher(request):
    """Repeat the solution that it was shown."""
    return f"refined: {request.prompt.text.split('solution:')[1].split(chr(10))[1]}"


def is_right(problem, text):
    """Tell whether the sum is in the answer."""
    return str(problem["sum"]) in text


def run(path, **options):
    """Run the problems through `student` into a file."""
    return generate(PROBLEMS, student, path, verify=is_right, progress=False, **options)


def records(path):
    """Return a file's records by their ids."""
    return {record["id"]: record for record in read_run(path)[1]}
