"""What a comparison of runs says, in English and in Chinese."""

from typing import Any

from trimtab.report.page import Words

NOTHING = Words("", "")

BETTER = Words(
    "{better} is better than {worse} by {value} nats {unit} (95 % interval {low} to {high}, {examples}, p {p}).",
    "{better} 优于 {worse}：{unit}低 {value} nats（95 % 置信区间 {low} ~ {high}，{examples}，p {p}）。",
)
NOT_DISTINGUISHABLE = Words(
    "{second} and {first} are {verdict}: {value} nats {unit} (95 % interval {low} to {high}, {examples}, p {p}).",
    "{second} 与 {first} {verdict}：{unit}相差 {value} nats（95 % 置信区间 {low} ~ {high}，{examples}，p {p}）。",
)
EVEN = Words("not distinguishable", "无法区分")
TOO_FEW_TO_TELL = Words("not distinguishable by so few examples", "因样本过少而无法区分")
IDENTICAL = Words(
    "{first} and {second}: no difference: identical losses on {examples}.",
    "{first} 与 {second}：没有差异，{examples}上的损失完全相同。",
)
REFUSED_PAIRS = Words("Not compared by loss: {pairs}: {why}.", "不按损失比较：{pairs}：{why}。")
REFUSED = Words("{first} and {second} are not compared by loss: {why}.", "{first} 与 {second} 不按损失比较：{why}。")
ADJUSTED = Words(
    "{count} comparisons: each p is adjusted for that (Holm), so that all verdicts together err with a probability of 5 %; the intervals "
    "are each one's own.",
    "共 {count} 项比较：各 p 值已据此校正（Holm），全部结论合计的误判概率为 5 %；各置信区间未作校正。",
)
TOO_FEW = Words(
    "Examples are few: on {common} of them, {count} comparisons could not tell even the largest difference from chance. Hold out more "
    "(data.eval), or compare fewer runs at a time.",
    "样本过少：在 {common} 条样本上作 {count} 项比较，再大的差异也无法与偶然相区分。请留出更多样本（data.eval），或一次比较较少的训练。",
)
OBJECTIVES = Words(
    "their objectives differ ({objectives}), and so does what a loss means",
    "两者的训练目标不同（{objectives}），损失的含义也不同",
)
SETTING = Words(
    "{key} differs ({first} and {second}), and so does what a loss means", "{key} 不同（{first} 与 {second}），损失的含义也不同"
)
REFERENCES = Words("their reference models differ, and so does what a loss means", "两者的参考模型不同，损失的含义也不同")
TOKENIZERS = Words(
    "their base models have different tokenizers, and losses of {name} are not comparable between them",
    "两者基座模型的分词器不同，{name} 的损失不能相互比较",
)
READ_OTHERWISE = Words(
    "their base models have different tokenizers, and {key} differs as well, so they are not asked the same",
    "两者基座模型的分词器不同，且 {key} 不同，模型面对的问题并不相同",
)
WHOLE_SET = Words(
    "{name} estimates a divergence on all validation examples together, and theirs are not the same",
    "{name} 在全部验证样本上估计散度，而两者的验证样本不同",
)
NONE_COMMON = Words(
    "they have no validation example in common (of {first} and {second}): hold out the same ones, by the same data, data.eval and data.seed",
    "两者没有共同的验证样本（各有 {first} 与 {second} 条）：请用相同的数据、data.eval 和 data.seed 留出相同的样本",
)
ONE_COMMON = Words(
    "they have only one validation example in common (of {first} and {second}): hold out the same ones, by the same data, data.eval and "
    "data.seed",
    "两者只有一条共同的验证样本（各有 {first} 与 {second} 条）：请用相同的数据、data.eval 和 data.seed 留出相同的样本",
)
OLD = Words(
    "{run} has no losses.json: an earlier version of Trimtab made it. `trimtab eval {run}` measures its loss again; to compare it example "
    "by example, train it again",
    "{run} 没有 losses.json：它由较早版本的 Trimtab 生成。`trimtab eval {run}` 可重新测量其损失；要逐样本比较，请重新训练",
)
NOTHING_HELD_OUT = Words(
    "{run} held out no examples (data.eval: 0). `trimtab eval {run} --data FILE` measures it on others",
    "{run} 没有留出验证样本（data.eval: 0）。`trimtab eval {run} --data FILE` 可在其他样本上测量",
)
NO_LOSSES_YET = Words("{run} has no losses.json yet: it is {status}", "{run} 还没有 losses.json：其状态为 {status}")
BY_BYTES = Words(
    "Where two base models have different tokenizers, losses are compared by the bytes of the answers; each model reads the question through "
    "its own chat template.",
    "若两个基座模型的分词器不同，则按回答的字节数比较损失；各模型通过自己的对话模板读取问题。",
)

HEADING = Words("Runs compared", "训练结果比较")
VERDICTS = Words("Which is better", "孰优孰劣")
BY_EXAMPLES = Words(
    "The losses of the best adapters on the validation examples that both runs of a pair have, example by example.",
    "各对训练结果的最佳适配器在共同验证样本上的损失，逐样本比较。",
)
RUNS, CURVES = Words("The runs", "训练结果"), Words("Curves", "曲线")
VALIDATION, TRAINING = Words("Validation loss, {what}", "验证损失，{what}"), Words("Training loss, {what}", "训练损失，{what}")
MEANS = Words("means over 5 % of the steps", "取 5 % 步数的均值")
SETTINGS, FACTS = Words("What differs in the recipes", "配方的差异"), Words("What else differs", "其他差异")
NO_DIFFERENCE = Words("Nothing.", "无。")
KEY, VALUE, IN = Words("key", "键"), Words("value", "值"), Words("in", "所属")
ANSWERS = Words("Answers", "回答")
SAMPLED = Words("Of the best adapter, on the examples of eval.samples", "最佳适配器在 eval.samples 样本上的结果")
CERTIFIED = Words("By the certificates", "据证书")
STOPPED, FORGOTTEN = (
    Words("answers that stopped at EOS", "以 EOS 结束的回答"),
    Words("change of the loss on general text", "通用文本损失的变化"),
)
QUESTION, EXPECTED = Words("question", "问题"), Words("expected", "期望的回答")
NUMBER = Words("answers", "回答数")
STATUS = {
    status.en: status
    for status in (
        Words("done, certified", "已完成，证书通过"),
        Words("done, NOT certified", "已完成，证书未通过"),
        Words("done, without a certificate", "已完成，没有证书"),
    )
}
COLUMNS = {
    "run": Words("run", "训练"), "before": Words("loss before", "训练前损失"), "best": Words("best loss", "最低损失"),
    "step": Words("after step", "所在步"), "tokens": Words("tokens", "词元数"), "seconds": Words("time", "用时"),
    "memory": Words("memory", "内存"),
}  # fmt: skip
FOOT = Words("Made by trimtab compare from the runs' folders.", "由 trimtab compare 根据各训练目录生成。")


def filled(words: Words, **values: Any) -> Words:
    """The words with their places filled, as plain text. A value that is itself words fills each language with its own."""
    texts = (
        text.format(**{name: value[n] if isinstance(value, Words) else value for name, value in values.items()})
        for n, text in enumerate(words)
    )
    return Words(*texts)


def common(count: int, of: tuple[int, int]) -> Words:
    """How many examples two runs have in common, and of how many."""
    if of == (count, count):
        return Words(f"{count:,} common examples", f"{count:,} 条共同样本")
    each = f"{of[0]:,}" if of[0] == of[1] else None
    return Words(
        f"{count:,} common examples of {each or f'{of[0]:,} and {of[1]:,}'}",
        f"{count:,} 条共同样本，各有 {each or f'{of[0]:,} 与 {of[1]:,}'} 条",
    )
