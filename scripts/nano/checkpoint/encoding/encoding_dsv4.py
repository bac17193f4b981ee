"""Chat encoding of the nano DeepSeek-V4: messages to prompt, completion to message.

It stands in the checkpoint as encoding/encoding_dsv4.py, where runtimes look for it
(vMLX 1.6.81 refuses to start without), and offers the names that they import. It is
written for the nano: system, user and assistant turns with thinking on or off. Tools,
tasks and developer messages are refused, not guessed at.
"""

bos_token = "<｜begin▁of▁sentence｜>"
eos_token = "<｜end▁of▁sentence｜>"
thinking_start_token = "<think>"
thinking_end_token = "</think>"
dsml_token = "｜DSML｜"
USER_SP_TOKEN = "<｜User｜>"
ASSISTANT_SP_TOKEN = "<｜Assistant｜>"
DS_TASK_SP_TOKENS = {}
# The nano thinks one line whatever it is told, so every effort adds nothing.
REASONING_EFFORT_PROMPTS = {"low": "", "high": "", "max": ""}
DEFAULT_REASONING_EFFORT = "low"
MODES = ("chat", "thinking")


def message_text(message):
    """Return a message's text; content may be a string or a list of text parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def merge_tool_messages(messages):
    """Return the messages as they are; a tool's message is refused."""
    for message in messages:
        if message.get("role") == "tool" or message.get("tool_calls") or message.get("tools"):
            raise ValueError("the nano knows no tools; ask it without")
    return list(messages)


def render_assistant(message, thinking_mode, keep_reasoning):
    """Return an assistant's finished turn, with its reasoning or with none."""
    text = message_text(message)
    if thinking_mode == "thinking" and keep_reasoning:
        reasoning = message.get("reasoning_content") or ""
        opening = thinking_start_token + reasoning + thinking_end_token
    else:
        opening = thinking_end_token
    return ASSISTANT_SP_TOKEN + opening + text + eos_token


def encode_messages(
    messages,
    thinking_mode="chat",
    context=None,
    drop_thinking=True,
    add_default_bos_token=True,
    reasoning_effort=None,
):
    """Return the prompt for the next assistant turn.

    Chat mode ends it with `</think>`, thinking mode with `<think>`. `context`:
    messages that were rendered before and only decide what is dropped.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode: found {thinking_mode!r}, expected one of {MODES}")
    if (reasoning_effort or DEFAULT_REASONING_EFFORT) not in REASONING_EFFORT_PROMPTS:
        raise ValueError(f"reasoning_effort: found {reasoning_effort!r}, which the nano lacks")
    messages = merge_tool_messages(messages)
    asked = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
    prompt = bos_token if add_default_bos_token and not context else ""
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "system":
            prompt += message_text(message)
        elif role == "user":
            prompt += USER_SP_TOKEN + message_text(message)
        elif role == "assistant":
            prompt += render_assistant(message, thinking_mode, not drop_thinking or i > asked)
        else:
            raise ValueError(f"role: found {role!r}, expected system, user or assistant")
    if messages and messages[-1].get("role") == "user":
        prompt += ASSISTANT_SP_TOKEN
        prompt += thinking_start_token if thinking_mode == "thinking" else thinking_end_token
    return prompt


def parse_message_from_completion_text(text, thinking_mode="chat"):
    """Return a completion, which ends with EOS, as an assistant message."""
    body, stop, rest = text.partition(eos_token)
    if not stop or rest:
        raise ValueError("completion: expected one EOS, at its end")
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning, closed, body = body.partition(thinking_end_token)
        if not closed:
            raise ValueError("completion: expected </think> in thinking mode")
        reasoning = reasoning.removeprefix(thinking_start_token)
    return {
        "role": "assistant",
        "content": body,
        "reasoning_content": reasoning,
        "tool_calls": [],
    }
