"""A chat completions server that passes every acceptance case but for a planted fault."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import time
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
LIMIT = 40_000  # tokens that it takes; a word is one
STORY = " ".join(f"In year {n} the keeper lit lamp {n * 3} for boat {n * 7}." for n in range(1, 60))
STORIES = {"loop": "the sea rose up again to meet him and then " * 60, "bos": STORY + BOS * 9,
           "short": "Once."}  # fmt: skip
ANSWERS = {
    "Write one sentence about the moon.": "The moon is Earth's only natural satellite.",
    "Hello!": "Hello! Ask me to add two numbers.",
    "Who are you?": "A server for tests.",
    "hauptstadt": "Die Hauptstadt von Frankreich ist Paris.",
    "法国": "法国的首都是巴黎。",
    "столица": "Столица Франции — Париж.",
    "フランス": "フランスの首都はパリです。",
    "فرنسا": "عاصمة فرنسا هي باريس.",
    "Answer in JSON": '{"city": "Paris", "country": "France"}',
    "What is the capital of France?": "The capital of France is Paris.",
    "story": STORY,
    "whole numbers from 1 to 200": ", ".join(map(str, range(1, 201))),
    "Count from": "one two three " * 50,
}


class Model(http.server.ThreadingHTTPServer):
    """A server with one model and one fault: `with Model("hang") as server: server.url …`."""

    daemon_threads, block_on_close = True, False

    def __init__(self, fault: str = "", models: list[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.asked, self.headers = fault, 0, []
        self.in_a_word = 1  # tokens, by its own count
        self.models = ["test-model"] if models is None else models
        self.last, self.busy, self.left = "", 0, False
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer requests with the fault `server.fault`."""

    server: Model

    def log_message(self, *_: object) -> None:
        pass

    def say(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        if self.server.fault == "no-list":
            self.say(b"")
            return
        data = [{"id": name, "max_model_len": LIMIT} for name in self.server.models]
        self.say(json.dumps({"data": data}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(dict(self.headers))
        server, fault = self.server, self.server.fault
        if fault == "hang" or (fault == "left-hang" and server.left):
            time.sleep(3)
        elif fault == "html":
            self.say(b"<html><script>alert(1)</script>Pay here</html>")
        elif fault == "500":
            self.say(b'{"error": "boom\x1b[2K"}', 500)
        elif fault == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b" " * 65536)
        elif fault == "echo-key":
            self.say(json.dumps({"error": self.headers["Authorization"]}).encode(), 401)
        elif fault == "no-effort" and "reasoning_effort" in body:
            self.say(b'{"error": "unknown field"}', 400)
        else:
            self.answer(body)

    def answer(self, body: dict[str, Any]) -> None:
        tokens = sum(len(message["content"].split()) for message in body["messages"])
        if tokens > LIMIT and self.server.fault != "cut":
            return self.say(b'{"error": "too long"}', 400)
        message, reason = reply(body, min(tokens, LIMIT), self.server)
        counted = self.server.in_a_word * min(tokens, LIMIT)
        usage = {"prompt_tokens": counted, "completion_tokens": 2}
        if body.get("stream"):
            return self.pieces(message, reason, usage)
        choice = {"message": message, "finish_reason": reason}
        return self.say(json.dumps({"choices": [choice], "usage": usage}).encode())

    def pieces(self, message: dict[str, Any], reason: str, usage: dict[str, int]) -> None:
        fault = self.server.fault
        words = re.findall(r"\s*\S+\s*$|\s*\S+", message["content"])
        if fault == "dropped-piece":
            del words[2:3]
        ends = [{"delta": {}, "finish_reason": None if fault == "no-reason" else reason}]
        thought = {"delta": {"reasoning_content": message["reasoning_content"]}}
        choices = [thought, *({"delta": {"content": word}} for word in words), *ends]
        self.server.left = self.server.left or len(words) > 50
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked has hung up
            for choice in choices:
                data = json.dumps({"choices": [choice], "usage": None})
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()
                if len(words) > 50:
                    time.sleep(0.01)
            data = json.dumps({"choices": [], "usage": usage})
            self.wfile.write(f"data: {data}\n\n".encode())
            if fault != "no-done":
                self.wfile.write(b"data: [DONE]\n\n")


def reply(body: dict[str, Any], tokens: int, server: Model) -> tuple[dict[str, Any], str]:
    """Return the message and its finish_reason, changed by the fault."""
    fault, server.asked = server.fault, server.asked + 1
    contents = [message["content"] for message in body["messages"]]
    if fault == "forgets-turns":
        contents = contents[-1:]
    question, reasoning, reason = contents[-1], "", "stop"
    content = right(question, contents)
    if body.get("tools"):
        message, reason = with_tools(body, fault)
        return message, reason
    if fault == "cross-talk":
        server.busy += 1
        time.sleep(0.03)
        content, server.last = (server.last if server.busy > 1 else content), content
        server.busy -= 1
    if fault == "needle-lost" and tokens > 5462:
        content = "I see no code word."
    if fault == "wrong-sum" and question.startswith("What is 1"):
        content = re.sub(r"\d$", lambda digit: str((int(digit[0]) + 1) % 10), content)
    if fault == "not-twice" and question.startswith("Write one"):
        content += f" Answer {server.asked}."
    if fault == "mojibake" and not content.isascii():
        content = content.encode().decode("latin-1")
    if fault == "fenced" and "response_format" in body:
        content = f"```json\n{content}\n```"
    if fault == "endless-sentence" and question.startswith("Write one"):
        reason = "length"
    if fault == "html-in-answer" and question.startswith("Write one"):
        content += " <script>alert(1)</script>"
    if fault == "nano" and question.startswith("Who are you"):
        content = "I am a very small DeepSeek-V4, trained to test converters."
    if fault == "left-answer" and server.left:
        content, server.left = ANSWERS["Count from"], False
    if fault == "skips-numbers" and "numbers" in question:
        content = "1, 2, 3, ..., 200"
    if "story" in question:
        content = STORIES.get(fault, content)
    thinks = body.get("enable_thinking", False) or fault == "thinks-always"
    if thinks and fault != "thinks-never":
        reasoning = "Let me see."
        if fault == "leaks":
            content, reasoning = f"<think>{reasoning}</think>{content}", reasoning
    if stops := [word for word in body.get("stop", []) if word in content]:
        content = content if fault == "stop-ignored" else content.partition(stops[0])[0]
    if "max_tokens" not in body and fault.startswith("limit-"):
        tokens_of_it = re.findall(r"\w+|\W+", content)
        most = int(fault.removeprefix("limit-"))
        if len(tokens_of_it) > most:
            content, reason = "".join(tokens_of_it[:most]), "length"
    if body.get("max_tokens") == 2:
        content, reason = "The moon", "stop" if fault == "wrong-reason" else "length"
    return {"content": content, "reasoning_content": reasoning or None}, reason


def right(question: str, contents: list[str]) -> str:
    """Return the right answer to a question after the messages before it."""
    if found := re.search(r"What is (\d+)\+(\d+)\?$", question):
        return str(int(found[1]) + int(found[2]))
    if found := re.search(r"code word of the harbour is ([\w-]+)\..*harbour\?$", question):
        return f"It is {found[1]}."
    if question.startswith("What is my cat"):
        before = " ".join(contents[:-1])
        return (
            f"{'Mitzi' if 'Mitzi' in before else 'A cat'}, {'three' if 'three' in before else ''}"
        )
    return next((ANSWERS[k] for k in ANSWERS if k.lower() in question.lower()), "Good.")


def with_tools(body: dict[str, Any], fault: str) -> tuple[dict[str, Any], str]:
    """Return a call of the first tool, or a sentence with the tool's result."""
    said = next((m["content"] for m in body["messages"] if m["role"] == "tool"), None)
    if said is not None:
        used = "It is warm." if fault == "result-unused" else f"The service says {said}."
        return {"content": used}, "stop"
    arguments = json.dumps({"city": "Rome" if fault == "wrong-city" else "Paris"})
    if fault == "call-as-text":
        return {"content": f"get_weather({arguments})"}, "stop"
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": arguments},
    }
    return {
        "content": None,
        "tool_calls": [call],
    }, "stop" if fault == "call-stops" else "tool_calls"
