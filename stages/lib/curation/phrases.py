"""What rules for cleaning look for where a recipe says nothing else: placeholders, refusals, marks of an end.

Gathered from data sets as they are published. All of it is compared without case, with quotes, commas and spaces written one
way (NFKC), so each stands here once.
"""

PLACEHOLDERS = (
    *("nooutput", "no output provided", "noinput", "no input provided", "no input required", "no input needed"),
    *("n/a", "n.a.", "#n/a", "not applicable", "none", "none provided", "null", "nan", "todo", "tbd"),
    *("placeholder", "input", "output", "deleted", "removed", "empty", "blank", "lorem ipsum"),
    *("输入", "输出", "无", "无输入", "无输出", "没有输入", "没有输出", "无需输入", "输入:无", "输出:无", "不适用"),
    *("なし", "入力なし", "出力なし", "없음", "нет ввода", "нет данных"),
)
"""Brackets around them, spaces and hyphens do not count either."""

END_MARKS = (
    *("<|endoftext|>", "<|end_of_text|>", "<|endofprompt|>", "</s>", "<eos>", "[EOS]", "<EOS>", "<|eos|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>"),
    *("<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<｜end▁of▁sentence｜>", "<|end_of_sentence|>"),
    *("<|endofturn|>", "<|end_of_role|>", "<|eos_token|>", "<eod>", "<|endofmessage|>", "<pad>", "<|pad|>"),
)

REFUSALS = (
    # English
    *(
        "as an ai language model",
        "as an ai model",
        "as an ai assistant",
        "as an ai text",
        "as an ai chatbot",
        "as an ai,",
    ),
    *("as a language model", "as a large language model", "as an artificial intelligence", "as a text-based ai"),
    *("as an ai developed", "as an ai created", "as an ai trained", "i'm just an ai", "i am just an ai"),
    *("i'm an ai language model", "i am an ai language model", "i'm an ai assistant", "i am an ai assistant"),
    *("sorry, but i can't", "sorry, but i cannot", "sorry, i can't", "sorry, i cannot", "sorry, but i am not able"),
    *("sorry, i'm unable", "sorry, i am unable", "sorry, i'm not able", "i cannot answer that", "i can't answer that"),
    *("sorry, but i'm not able", "sorry, but i'm unable", "sorry, but i am unable", "sorry, but as an ai"),
    *("i apologize, but i can't", "i apologize, but i cannot", "i apologize, but as an ai", "i apologize, but i am"),
    *("i can't assist with", "i cannot assist with", "i can't help with that", "i cannot help with that"),
    *("i can't fulfill", "i cannot fulfill", "i can't comply with", "i cannot comply with", "i must decline"),
    *("i'm unable to assist", "i am unable to assist", "i'm unable to fulfill", "i am unable to fulfill"),
    *("i'm unable to provide", "i am unable to provide", "i cannot provide information", "i can't provide information"),
    # Chinese
    *("作为一个ai", "作为一名ai", "作为ai", "作为一款ai", "作为一个人工智能", "作为一名人工智能", "作为人工智能"),
    *("作为一个语言模型", "作为语言模型", "作为一个大型语言模型", "作为一个大语言模型", "作为大语言模型"),
    *("我是一个ai语言模型", "我是一个人工智能", "我是ai语言模型", "我只是一个ai", "我只是一个人工智能"),
    *("对不起,我无法", "抱歉,我无法", "对不起,我不能", "抱歉,我不能", "抱歉,但我无法", "抱歉,但我不能"),
    *("身为一个ai", "身为ai", "对不起,但我不能", "对不起,但我无法", "抱歉,我没有办法"),
    *("对不起,作为", "抱歉,作为", "我无法满足您的请求", "我不能满足您的请求", "我无法协助", "我无法提供帮助"),
    *("作為一個ai", "作為ai", "作為一個人工智慧", "作為人工智慧", "作為一個語言模型", "抱歉,我無法", "對不起,我無法"),
    # Japanese, Korean
    *("ai言語モデルとして", "aiアシスタントとして", "大規模言語モデルとして", "言語モデルとして", "aiとして"),
    *("申し訳ありませんが、お手伝い", "申し訳ございませんが、お手伝い", "申し訳ありませんが、その"),
    *(
        "ai 언어 모델로서",
        "ai 모델로서",
        "인공지능 언어 모델로서",
        "언어 모델로서",
        "죄송하지만, 저는",
        "죄송합니다만, 저는",
    ),
    # Spanish, Portuguese, French, Italian, German, Russian
    *("como modelo de lenguaje", "como una ia", "como inteligencia artificial", "lo siento, pero no puedo"),
    *("como um modelo de linguagem", "como uma ia", "desculpe, mas não posso", "sinto muito, mas não posso"),
    *("en tant que modèle de langage", "en tant qu'ia", "en tant qu'intelligence artificielle"),
    *("je suis désolé, mais je ne peux pas", "désolé, mais je ne peux pas"),
    *("come modello di linguaggio", "come modello linguistico", "come intelligenza artificiale"),
    *("mi dispiace, ma non posso",),
    *("als ki-sprachmodell", "als ki-modell", "als sprachmodell", "als künstliche intelligenz"),
    *("tut mir leid, aber ich kann", "tut mir leid, ich kann"),
    *("как языковая модель", "как ии-модель", "как искусственный интеллект", "извините, но я не могу"),
)

TEX_COMMANDS = (
    *"nabla natural ncong ne nearrow neg neq newcommand newenvironment newline newpage nexists ngeq ngtr ni".split(),
    *"nleftarrow nleq nless nmid nocite noindent nolimits nonumber normalsize not notag notin nparallel".split(),
    *"nprec nrightarrow nsim nsubseteq nsucc nu num nwarrow".split(),
    *"tag tan tanh tau tbinom text textbf textit textrm textsc textsf textstyle texttt textup tfrac thanks".split(),
    *"therefore theta thickapprox thicksim thinspace tilde times tiny title to top triangle triangleq".split(),
    *"triangleleft triangleright tt twoheadrightarrow".split(),
)
"""Commands of TeX and LaTeX that begin with n or t: after a backslash, they are no line break and no tab."""
