"""Every text of a run's report, in both languages. Names of findings, tests and measures are those of the run's files."""

from trimtab.artifacts.run_status import ADVICE
from trimtab.report.page.words import Words

# The page
TITLE = Words("Run {run}", "训练 {run}")
WRITTEN = Words(
    "Written {when} by Trimtab {version}, from the files of {run} alone.",
    "本页由 Trimtab {version} 于 {when} 根据 {run} 中的文件生成。",
)
AGAIN = Words("Make it again: {command}", "重新生成：{command}")
UNREADABLE = Words("Not shown, because it can't be read: {what}", "以下内容无法读取，未显示：{what}")
RECORDED = Words("Messages in English are quoted from the run's files.", "英文消息为运行文件中的原文。")
AND_MORE = Words("… and {count} more, in {file}.", "……其余 {count} 条见 {file}。")

# The verdict
FELL = Words("{loss} fell from {before} to {after} ({evidence})", "{loss}从 {before} 降至 {after}（{evidence}）")
ROSE = Words("{loss} rose from {before} to {after} ({evidence})", "{loss}从 {before} 升至 {after}（{evidence}）")
SAME = Words(
    "{loss} did not change beyond noise: {before} before, {after} after ({evidence})",
    "{loss}的变化没有超出噪声：训练前 {before}，训练后 {after}（{evidence}）",
)
DIFFERENCE = Words(
    "difference {difference}, 95 % interval {low} to {high}, {count} examples",
    "差值 {difference}，95 % 置信区间 {low} ~ {high}，{count} 条样本",
)
DIFFERENCE_ALONE = Words("difference {difference}, {count} examples", "差值 {difference}，{count} 条样本")
LOWEST = Words("{loss}: {after} at its lowest, on {count} examples", "{loss}最低为 {after}（{count} 条样本）")
TRAINED_ONLY = Words(
    "Training loss went from {before} to {after}; there are no validation examples, so the improvement is unknown",
    "训练损失从 {before} 变为 {after}；没有验证集，无法得知效果是否提升",
)
NOT_EVALUATED = Words(
    "Training loss went from {before} to {after}; the validation examples have not been evaluated yet",
    "训练损失从 {before} 变为 {after}；验证集尚未评估",
)
NO_LOSS = Words("No loss has been measured", "尚未测得损失")
VALIDATION_LOSS = Words("Validation loss", "验证集损失")
VALIDATION_LOSS_OF = Words("Validation loss ({objective})", "验证集损失（{objective}）")
SENTENCE = Words("{outcome}; {ending}.", "{outcome}；{ending}。")
PASSED = Words("the certificate passed", "证书测试全部通过")
NOT_PASSED = Words("the certificate did NOT pass ({tests})", "证书测试未通过（{tests}）")
NOT_CERTIFIED = Words("the adapter is not certified", "适配器没有证书")
CERTIFYING = Words("training is done, and the certificate is not made yet", "训练已完成，证书尚未生成")
CHANGED_CERTIFICATE = Words("its certificate can't be used", "证书无法使用")
SO_FAR = Words("So far: {outcome}.", "截至目前：{outcome}。")
RUNNING = Words(
    "Training: step {step} of {steps} when this page was written.", "训练中：本页生成时已完成第 {step} 步，共 {steps} 步。"
)
INTERRUPTED = Words("Interrupted after step {step} of {steps}.", "训练在第 {step} 步后中断，共 {steps} 步。")
FAILED = Words("The run ended by an error after step {step} of {steps}.", "训练在第 {step} 步后因错误结束，共 {steps} 步。")
IS_RUNNING = Words(
    "The page is written again at every evaluation. If the process was killed, resume it: {command}",
    "每次评估后本页都会更新。如果进程已被强行终止，可执行以下命令恢复训练：{command}",
)
TO_RESUME = Words("Resume from the last checkpoint: {command}", "从最近的检查点恢复训练：{command}")
TO_START_AGAIN = Words("Nothing has been saved yet; this starts again: {command}", "尚未保存检查点；重新开始：{command}")
AFTER_FAILURE = Words(
    "Do what the error says, then resume from the last checkpoint: {command}",
    "按错误信息处理后，从最近的检查点恢复训练：{command}",
)
STOPPED_EARLY = Words("Training stopped early: {reason}", "训练提前停止：{reason}")
SKIPPED = Words(
    "Steps that were skipped, because their loss or gradient was NaN or Inf: {count}.",
    "有 {count} 步的损失或梯度为 NaN 或 Inf，已跳过。",
)
ANSWERS_CHANGED = Words("{measure} of {count} sampled answers: {before} before training, {after} at step {step}.",
    "{count} 条抽样回答的{measure}：训练前 {before}，第 {step} 步 {after}。")  # fmt: skip
ANSWERS_NOW = Words(
    "{measure} of {count} sampled answers: {after} at step {step}.",
    "{count} 条抽样回答的{measure}：第 {step} 步 {after}。",
)
EXAMPLES_CHANGED = Words(
    "Of {count} validation examples, {better} have a lower loss with the adapter than before training, and {worse} a higher one.",
    "{count} 条验证样本中，{better} 条的损失低于训练前，{worse} 条高于训练前。",
)

# Curves
CURVES = Words("Curves", "训练曲线")
LOSS = Words("Loss", "损失")
NATS = Words("nats a token", "每 token，单位 nat")
TRAINING = Words("Training", "训练集")
VALIDATION = Words("Validation", "验证集")
BEST = Words("Lowest validation loss: {loss} at step {step}", "最低验证集损失：第 {step} 步，{loss}")
LEARNING_RATE = Words("Learning rate", "学习率")
GRADIENT_NORM = Words("Gradient norm", "梯度范数")
SMOOTHED = Words("{name}, smoothed", "{name}（平滑）")
BEFORE_CLIPPING = Words("before clipping", "裁剪前")
BY_SOURCE = Words("Validation loss by source", "各数据源的验证集损失")
NO_CURVES = Words("No step has been logged yet.", "尚无训练记录。")
MEASURES = {
    "accuracy": Words("Reward accuracy", "奖励准确率"),
    "margin": Words("Reward margin", "奖励间隔（margin）"),
    "kl": Words("KL estimate", "KL 估计"),
    "chosen_reward": Words("Reward of chosen answers", "chosen 回答的奖励"),
    "rejected_reward": Words("Reward of rejected answers", "rejected 回答的奖励"),
    "good_reward": Words("Reward of good answers", "好回答的奖励"),
    "bad_reward": Words("Reward of bad answers", "差回答的奖励"),
    "chosen_logp": Words("Log-probability of chosen answers", "chosen 回答的对数概率"),
    "rejected_logp": Words("Log-probability of rejected answers", "rejected 回答的对数概率"),
    "good_logp": Words("Log-probability of good answers", "好回答的对数概率"),
    "bad_logp": Words("Log-probability of bad answers", "差回答的对数概率"),
    "exact_match": Words("Exact match", "精确匹配率"),
    "loss_scale": Words("Loss scale", "损失缩放系数"),
}

# Examples
EXAMPLES = Words("Answers before and after", "训练前后的回答")
ABOUT_EXAMPLES = Words(
    "The first {count} validation examples, in the order of the data, not chosen by their result, with the adapter of step {step}. "
    "Marked: {missing} and {extra}.",
    "按数据顺序的前 {count} 条验证样本，未按结果挑选；使用第 {step} 步的适配器。标记：{missing}，{extra}。",
)
MISSING, EXTRA = Words("missing from the answer", "回答中缺少"), Words("said instead", "回答中不同或多出")
QUESTION = Words("Question", "问题")
EXPECTED = Words("Expected", "期望回答")
WITH_ADAPTER = Words("With the adapter", "加适配器")
BEFORE_TRAINING = Words("Before training", "训练前")
RIGHT, WRONG = Words("✓ right", "✓ 正确"), Words("✗ differs", "✗ 不一致")
ENDED = {
    "length": Words("(cut off at the length limit)", "（达到长度上限，被截断）"),
    "context": Words("(cut off: the context was full)", "（上下文已满，被截断）"),
}
ANSWERS = Words("Answers", "回答")
CERTIFIED_ANSWERS = Words(
    "Answers that the certificate's new process generated, to the first prompts of the validation examples.",
    "证书测试时由新进程对验证集前几条提示生成的回答。",
)
KEEP_SAMPLES = Words(
    "The recipe's key eval.samples keeps expected answers beside them, and those before training.",
    "在配方中设置 eval.samples 后，会同时保留期望回答和训练前的回答。",
)
NOTHING_EMPTY = Words("(empty)", "（空）")

# The certificate
CERTIFICATE = Words("Certificate", "证书")
ABOUT_CERTIFICATE = Words(
    "A new process loaded the saved adapter from disk and tested it.", "由一个新进程从磁盘加载保存的适配器并测试。"
)
NO_CERTIFICATE = Words("There is no certificate.", "没有证书。")
NOT_ASKED = Words("The recipe asks for none (certify: false).", "配方没有要求出具证书（certify: false）。")
STATUS = {
    "passed": Words("passed", "通过"),
    "noted": Words("noted", "提示"),
    "failed": Words("FAILED", "未通过"),
    "good": Words("good", "正常"),
    "note": Words("note", "提示"),
    "problem": Words("problem", "问题"),
}
TESTS = {
    "reload": Words(
        "What was saved is what was trained: the reloaded adapter gives the log-probabilities of training.",
        "保存的就是训练出来的：重新加载的适配器给出的对数概率与训练时一致。",
    ),
    "base": Words(
        "The base model's weights, tokenizer and chat template are unchanged, and the adapter has no NaN or Inf.",
        "基座模型的权重、分词器和对话模板没有变化，适配器中没有 NaN 或 Inf。",
    ),
    "moved": Words("Training has changed every tensor of the adapter.", "适配器的每个张量都被训练改变过。"),
    "steps": Words("Whether steps were skipped.", "是否有被跳过的步。"),
    "stops": Words("Answers end by themselves, with a stop token.", "回答能以结束符正常停止。"),
    "gain": Words(
        "Validation loss, compared with the model before training on the same examples.",
        "在相同样本上，与训练前的模型相比的验证集损失。",
    ),
    "forgetting": Words("How much worse the model has become on general text.", "模型在通用文本上变差了多少（遗忘）。"),
}
ADVICE_WORDS = {
    "reload": Words(ADVICE["reload"], "配方中没有任何设置能解释这一点：请保留该目录并报告问题。"),
    "base": Words(ADVICE["base"], "训练开始后基座模型的文件被改动：请恢复这些文件，然后重新训练。"),
    "moved": Words(ADVICE["moved"], "没有梯度到达未改变的张量：请更换 method.targets，或提高 train.lr。"),
    "stops": Words(ADVICE["stops"], "训练不足，模型没有学会结束回答：请增加 train.epochs 或样本，或提高 train.lr。"),
    "gain": Words(
        ADVICE["gain"],
        "在验证集上比训练前更差：请减少 train.epochs、增加样本或降低 train.lr，并检查验证集是否与训练集属于同一任务。",
    ),
}
WHAT_TO_DO = Words("What to do: {advice}", "处理建议：{advice}")

# The data
DATA = Words("Data", "数据")
ABOUT_DATA = Words(
    "{train} training examples with {tokens} target tokens; {held_out} validation examples.",
    "训练样本 {train} 条，共 {tokens} 个目标 token；验证样本 {held_out} 条。",
)
SOURCE, READ, USED, REJECTED = (
    Words("Source", "数据源"),
    Words("Examples", "样本"),
    Words("Used", "使用"),
    Words("Rejected", "拒绝"),
)
TOO_LONG, DUPLICATES = Words("Too long, dropped", "过长丢弃"), Words("Duplicates removed", "重复去除")
HELD_OUT_TOO = Words("Removed: validation examples too", "与验证集重复去除")
REASONS = Words("Rejected examples and why", "被拒绝的样本及原因")
CHECKS = Words("Checks before the first step", "训练前的检查")
DIGEST = Words("Digest of the tokenized data: {digest}", "分词后数据的摘要：{digest}")
FINDINGS = {
    "rows": Words("Examples used and rejected", "使用和拒绝的样本"),
    "mixture": Words("Shares of the sources", "各数据源的占比"),
    "repetition": Words("How often a source repeats", "数据源的重复次数"),
    "tokens": Words("Target tokens", "目标 token"),
    "loss mask": Words("Which tokens are trained on", "哪些 token 参与训练"),
    "stop tokens": Words("Every example ends with a stop token", "样本以结束符结尾"),
    "rendering": Words("Prompts are those of generation", "提示与生成时一致"),
    "reasoning": Words("Reasoning in answers", "回答中的推理过程"),
    "duplicates": Words("Repeated training examples", "重复的训练样本"),
    "held out": Words("Validation examples in the training data", "训练集中的验证样本"),
    "answers": Words("Different answers", "回答的多样性"),
    "special tokens": Words("Special tokens in texts", "文本中的特殊 token"),
    "lengths": Words("Lengths of the two answers", "两种回答的长度"),
    "capacity": Words("Parameters and target tokens", "参数量与目标 token 数"),
    "layers": Words("What computes the layers", "各层的计算方式"),
    "memory": Words("Memory", "内存"),
    "disk": Words("Free space for the run", "磁盘剩余空间"),
}

# What was trained
TRAINED = Words("What was trained, and where", "训练内容与环境")
BASE_MODEL, METHOD = Words("Base model", "基座模型"), Words("Method", "微调方法")
TRAINED_PARAMETERS = Words("{trained} of {frozen} parameters ({share} %)", "{trained} 个，基座模型 {frozen} 个（占 {share} %）")
TRAINABLE = Words("Trained", "可训练参数")
MODULES, FROZEN_MODULES = Words("Modules", "作用模块"), Words("Not adapted, frozen", "未作用（冻结）")
VIRTUAL = Words("Positions of virtual tokens", "虚拟 token 占用的位置")
OBJECTIVE, REFERENCE, STARTED_FROM = (
    Words("Objective", "训练目标"),
    Words("Reference model", "参考模型"),
    Words("Started from", "起点适配器"),
)
REFERENCES = {"base": BASE_MODEL, "start": Words("the adapter that training starts from", "训练起点的适配器")}
STEPS = Words("Steps", "训练步数")
STEPS_TEXT = Words(
    "{steps}, of {rows} examples each on average (effective batch size); {epochs} epochs",
    "{steps} 步，有效批大小 {rows}；{epochs} 轮",
)
RATE_TEXT = Words("{rate} at its peak ({formula})", "峰值 {rate}（{formula}）")
GIVEN = Words("given in the recipe", "由配方指定")
DEVICE, THREADS, VERSIONS = Words("Device", "设备"), Words("Threads", "线程数"), Words("Versions", "版本")
STARTED = Words("Started", "开始时间")
FINGERPRINT = Words("Fingerprint of its weights", "权重指纹")
ADAPTER_STEP = Words("Adapter", "适配器")
ADAPTER_TEXT = Words("of step {step}, in {folder}", "第 {step} 步，位于 {folder}")

# Time, memory, tokens
COST = Words("Time, memory and tokens", "时间、内存与 token")
TIME = Words("Time", "用时")
TIME_TEXT = Words("{time} with evaluation; {rate} tokens a second", "{time}（含评估）；每秒 {rate} 个 token")
SECONDS, MINUTES, HOURS = Words("{n} s", "{n} 秒"), Words("{n} min", "{n} 分钟"), Words("{n} h", "{n} 小时")
MEMORY_HELD = Words("Memory, at most", "内存峰值")
MEMORY_TEXT = Words("{measured} GB measured, {planned} GB planned ({before} GB before training)",
    "实测 {measured} GB，计划 {planned} GB（训练前 {before} GB）")  # fmt: skip
PLAN = Words("Plan", "内存计划")
TOKENS_GIVEN, TOKENS_PROCESSED = (
    Words("Tokens of the examples", "样本 token 数"),
    Words("Tokens processed", "实际计算 token 数"),
)
PROCESSED_TEXT = Words(
    "{count} ({share} %): shared prefixes once, nothing after the last target token",
    "{count}（{share} %）：公共前缀只算一次，最后一个目标 token 之后不计算",
)

# Commands and the recipe
COMMANDS = Words("Next commands", "后续命令")
COMMAND_WORDS = {
    "resume": Words("Resume the run", "恢复训练"),
    "chat": Words("Chat with it, beside the base model", "对话，同时显示基座模型的回答"),
    "eval": Words("Evaluate it beside the base model", "评测，并与基座模型对比"),
    "merge": Words("Merge it into the base model, as a standalone model", "合并进基座模型，保存为独立模型"),
    "verify": Words("Verify the certificate again", "复验证书"),
    "repeat": Words("Repeat the run in another folder", "在另一目录重复这次训练"),
    "show": Words("Show the run on the terminal", "在终端查看这次训练"),
}
SHOW_RECIPE = Words("Show it", "展开")
RECIPE = Words("Recipe", "配方")
ABOUT_RECIPE = Words("With every default written out. It repeats the run.", "写出了全部默认值，可用来重复这次训练。")

# The page of `trimtab check`
DATA_CHECK = Words("Data check", "数据检查")
VERDICTS = {
    "good": Words("Ready to train: all {count} checks are good.", "可以开始训练：{count} 项检查全部正常。"),
    "note": Words(
        "Ready to train. Please read the notes of {names} ({count}).", "可以开始训练，请先阅读 {count} 条提示（{names}）。"
    ),
    "problem": Words("Not ready to train: problems with {names} ({count}).", "不能开始训练：{count} 个问题（{names}）。"),
}
TARGETS_EACH, TARGET_TOKENS = (
    Words("Target tokens per example", "每条样本的目标 token 数"),
    Words("Target tokens", "目标 token"),
)
TOKENIZED = Words("Tokenized examples", "分词后的样本")
ABOUT_MARKS = Words(
    "Marked: target tokens, which are trained on, with their weight in the loss where it isn't 1; the rest is context.",
    "标记部分是参与训练的目标 token，权重不为 1 时标出其在损失中的权重；其余为上下文。",
)
