"""Records of every format that is known, and the spans of each, found by hand."""

from __future__ import annotations

from transcripts import chat

from sadkern.spans import ACT, REASON

R, A = REASON, ACT

PAPER = [
    (
        "You are a helper in a house.\nGoal: Put the soap on the sink.\n"
        "Reasoning: First, where is the soap?\nAction: go to bathroom.\n"
        "Observation: You see a soap.\nAction: take soap.",
        [(R, "First, where is the soap?"), (A, "go to bathroom."), (A, "take soap.")],
    ),
    (
        "User goal: A camera under $100.\r\nReasoning: Search first.\r\n"
        'Action: [Search] "camera".\r\nPage 1 of 3\r\nAction: [Buy] it \r\n',
        [(R, "Search first."), (A, '[Search] "camera".'), (A, "[Buy] it")],
    ),
    (
        "Q: Where was its author born?\nLet us think step by step.\nReasoning: Darwin wrote it.\n"
        "Reasoning: He was born in Shrewsbury.\nAnswer: Shrewsbury",
        [(R, "Darwin wrote it."), (R, "He was born in Shrewsbury."), (A, "Shrewsbury")],
    ),
    (
        "Instruction: be brief.\nReasoning: two things:\n- a knife\n\n- a pan\nGoal: unchanged\n"
        "Action:\tslice bread\nYou sliced it. Action: nothing\n",
        [(R, "two things:\n- a knife\n\n- a pan"), (A, "slice bread")],
    ),
    (
        "Reasoning:\nAction:   \n  Reasoning:  le café 漢字 😀 est fermé  \nAction:open café\n"
        "reasoning: in small letters this is no marker\n",
        [(R, "le café 漢字 😀 est fermé"), (A, "open café")],
    ),
]

HOTPOTQA = [
    (
        "Thought 1: one\nAction 1: think[two\nlines]\nObservation 1: OK.\nAction 2: Finish[3]\n",
        [(R, "one"), (R, "think[two\nlines]"), (A, "Finish[3]")],
    ),
    (
        "Question: In what year did the band split?\nThought 1: I need its name.\n"
        "Action 1: Search[Creed]\nObservation 1: A creed is a statement.\nIt is old.\n"
        "Thought 2: So 2004.\nAction 2: Finish[2004]\nObservation 2: Answer is CORRECT\n",
        [(R, "I need its name."), (A, "Search[Creed]"), (R, "So 2004."), (A, "Finish[2004]")],
    ),
    (
        "ActionPath 1: Start\nThought 1: Either node will do.\nActionPath 2: Start->Search\n"
        "Action 12: Lookup[Ariel: a role]\nThought 12 : Done",
        [(R, "Either node will do."), (A, "Lookup[Ariel: a role]"), (R, "Done")],
    ),
    (
        "Thought 1: It lists\r\n  1. one\r\n  2. two\r\nAction 1: Finish[two]\r\n",
        [(R, "It lists\r\n  1. one\r\n  2. two"), (A, "Finish[two]")],
    ),
    (
        "Thoughts: no marker\nThought 1: Straße, ಕನ್ನಡ?\nAction 1:\nObservation 1: Thought: no\n"
        "Action 2: Search[ಕನ್ನಡ]\nInvalid action! Action 3: x",
        [(R, "Straße, ಕನ್ನಡ?"), (A, "Search[ಕನ್ನಡ]")],
    ),
    (
        "Question: Which came first? You failed before, a plan follows.\nReflections:\n"
        "- I looked up the wrong one.\n- Next time: the other.\nThought 1: The other, then.\n"
        "Action 1: Finish[the other]",
        [(R, "The other, then."), (A, "Finish[the other]")],
    ),
]

FIREACT = [
    (
        "Thought: one\nAction: think[two]\nObservation: OK.\nAction: thinking\n",
        [(R, "one"), (R, "think[two]"), (A, "thinking")],
    ),
    (
        "Below is an instruction.\n\n### Instruction:\nWho won?\n\n### Response:\n"
        "Thought: Look it up.\nAction: search[Who won?]\nObservation: The Jayhawks\n"
        "Thought: I have it.\nAction: finish[The Jayhawks]\nObservation: Episode finished\n",
        [
            (R, "Look it up."),
            (A, "search[Who won?]"),
            (R, "I have it."),
            (A, "finish[The Jayhawks]"),
        ],
    ),
    (
        "Question: 2 + 2?\nThought: Two and two.\nAnswer: 4\nQuestion: 3 + 3?\nThought: As above.\n"
        "Answer: 6",
        [(R, "Two and two."), (A, "4"), (R, "As above."), (A, "6")],
    ),
    (
        "Thought: a tool will know\nAction: calculator\nAction Input: 7 * 6\nObservation: 42\n"
        "Thought: I know it now\nFinal Answer: 42",
        [(R, "a tool will know"), (A, "calculator"), (A, "7 * 6"), (R, "I know it now"), (A, "42")],
    ),
    (
        "Thought: three lines,\n\none of them empty\nAction: finish[]\n",
        [(R, "three lines,\n\none of them empty"), (A, "finish[]")],
    ),
    (
        "  Thought:\tdeep \u00a0\n Action:finish[\u2028]\nObservation:\n",
        [(R, "deep"), (A, "finish[\u2028]")],
    ),
]

WEBSHOP = [
    (
        "Action: reset\nObservation: \nWebshop \nInstruction:  \na red mug, below 20 dollars \n"
        "[Search] \n\nAction: search[red mug]\nObservation: \n[B01] \nA red mug \n$12 \n\n"
        "Action: think[B01 is red and cheap. I take it.]\nObservation: OK.\n\n"
        "Action: click[B01]\nObservation: \nPrice: $12 \n\nAction: click[Buy Now]\n",
        [
            (A, "search[red mug]"),
            (R, "think[B01 is red and cheap. I take it.]"),
            (A, "click[B01]"),
            (A, "click[Buy Now]"),
        ],
    ),
    (
        "Action: think[It comes in 'red', 'blue\nObservation: OK.\n\nAction: click[red]\n",
        [(R, "think[It comes in 'red', 'blue"), (A, "click[red]")],
    ),
    (
        "Action: click[< Prev]\nObservation: Invalid action!\n\nAction: reset the page\n",
        [(A, "click[< Prev]"), (A, "reset the page")],
    ),
    (
        "Action: think[First,\nsecond.]\r\nObservation: OK.\r\nAction: click[é漢]\r\n",
        [(R, "think[First,\nsecond.]"), (A, "click[é漢]")],
    ),
    (
        "Action: reset\nObservation: Instruction: think[no]\nThought: none of those\n"
        "Action: click[Back to Search]",
        [(R, "none of those"), (A, "click[Back to Search]")],
    ),
]

ALFWORLD = [
    (
        "You are in a room. You see a desk 1.\nYour task is to: put a mug in desk.\n"
        "> think: A mug is on a desk, or\tso.\nOK.\n> go to desk 1\nYou see a mug 1.\n"
        ">take mug 1 from desk 1\nYou pick up the mug 1.\n",
        [(R, "A mug is on a desk, or\tso."), (A, "go to desk 1"), (A, "take mug 1 from desk 1")],
    ),
    (
        " think: It begins in a thought.\nOK.\n> look\nYou see nothing.\n>\n",
        [(R, "It begins in a thought."), (A, "look")],
    ),
    (
        "> think: done here\nOK.\n>\n\n\n go to safe 1\nThe safe 1 is closed.\n>\n\nYou won\n",
        [(R, "done here"), (A, "go to safe 1")],
    ),
    (
        "Your task is to: cool a pan.\n> Think: First a pan.\n> ActionPath: Start\n"
        "> go to fridge 1\nNothing happens.\n> Task failed.\nNothing happens.\n> think\n",
        [(R, "First a pan."), (A, "go to fridge 1"), (A, "Task failed."), (A, "think")],
    ),
    (
        "> \r\n\r\n think: as before\r\nOK.\r\n> use desklamp 1 \r\nYou turn it on.\r\n",
        [(R, "as before"), (A, "use desklamp 1")],
    ),
]

ETO = [
    (
        chat("Buy.", "Action: think[which?]", "OK.", "Action:\nsearch[x]"),
        [(R, "think[which?]"), (A, "search[x]")],
    ),
    (
        chat("Put a mug.", "Thought: Where?\nAction: go to desk 1", "Observation: a mug"),
        [(R, "Where?"), (A, "go to desk 1")],
    ),
    (
        {
            "conversations": [
                {"from": "human", "loss": None, "value": "Thought: this is the prompt's"},
                {"from": "gpt", "loss": False, "value": "OK.\nAction: this is not learnt"},
                {"from": "human", "loss": None, "value": "You see a door."},
                {"from": "gpt", "loss": True, "value": "Thought:\nA door.\n\nAction:\nopen door 1"},
            ]
        },
        [(R, "A door."), (A, "open door 1")],
    ),
    (
        chat("Go.", "I look for it first.\nAction: look", "Nothing.", "Thought: No.\nAction: a\nb"),
        [(R, "I look for it first."), (A, "look"), (R, "No."), (A, "a\nb")],
    ),
    (
        chat("Go.", "Thought: x\nAction: run\nObservation: made up\nThought: y\nAction: stop"),
        [(R, "x"), (A, "run"), (R, "y"), (A, "stop")],
    ),
    (
        [
            {"role": "user", "content": "Wo?"},
            {"from": "gpt", "content": "Thought: Draußen 😀\nAction: geh\n"},
            {"role": "user", "content": "Observation: Hier."},
            {"role": "agent", "content": "Understood."},
        ],
        [(R, "Draußen 😀"), (A, "geh")],
    ),
]

AGENTTUNING = [
    (
        chat("Buy.", "ACTION: think[which?]", "OK.", "ACTION: click[x]"),
        [(R, "think[which?]"), (A, "click[x]")],
    ),
    (
        chat("Begin.", "THOUGHT: The fridge is near.\nACTION: open fridge 1", "It is open."),
        [(R, "The fridge is near."), (A, "open fridge 1")],
    ),
    (
        chat("How many files?", "Think: Count them.\n\nAct: bash\n\n```bash\nls | wc -l\n```", "3",
             "Think: Three.\n\nAct: answer(3)"),
        [(R, "Count them."), (A, "bash\n\n```bash\nls | wc -l\n```"), (R, "Three."),
         (A, "answer(3)")],
    ),
    (
        chat("Who is oldest?", "I sort by age.\nAction: Operation\n```sql\nSELECT 1\n```", "[(1,)]",
             "That is all.\nAction: Answer\nFinal Answer: [1]"),
        [(R, "I sort by age."), (A, "Operation\n```sql\nSELECT 1\n```"), (R, "That is all."),
         (A, "Answer"), (A, "[1]")],
    ),
    (
        {"conversations": [
            {"from": "human", "loss": None, "value": "THOUGHT: no"},
            {"from": "gpt", "loss": False, "value": "THOUGHT: an example\nACTION: shown"},
            {"from": "gpt", "loss": True, "value": "THOUGHT: own\nACTION: done"},
        ]},
        [(R, "own"), (A, "done")],
    ),
    (
        chat("Start.", "Ok.", "Room.", "Act: finish"),
        [(A, "finish")],
    ),
]  # fmt: skip

CALL = {"type": "function", "function": {"name": "find", "arguments": '{"what": "é"}'}}
SAID = '{"name": "find", "arguments": {"what": "é"}}'
CHAT = [
    (
        [
            {"role": "system", "content": "<think>a prompt's</think>"},
            {"role": "user", "content": "Find it."},
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
            {"role": "tool", "content": "<tool_call>no</tool_call>", "name": "find"},
            {"role": "assistant", "content": "Here it is."},
        ],
        [(R, "I look."), (A, SAID), (A, "Here it is.")],
    ),
    (
        chat("2 + 2?", "<think>\nTwo and two.\n\nFour.\n</think>\n\nIt is 4."),
        [(R, "Two and two.\n\nFour."), (A, "It is 4.")],
    ),
    (
        chat("Go.", "<think>hm</think>I call.\n<tool_call>\n{\"name\": \"x\"}\n</tool_call>\n"
             "<tool_call>\n{\"name\": \"y\"}\n</tool_call>"),
        [(R, "hm"), (R, "I call."), (A, '{"name": "x"}'), (A, '{"name": "y"}')],
    ),
    (
        [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "reasoning_content": "Two ways.\n", "content": None,
             "tool_calls": [CALL, CALL]},
        ],
        [(R, "Two ways."), (A, SAID), (A, SAID)],
    ),
    (
        chat("Go.", "the prompt opened it</think>Done.", "Sure?", "<think>cut off by the"),
        [(R, "the prompt opened it"), (A, "Done."), (R, "cut off by the")],
    ),
    (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "A file."},
                {"type": "text", "text": "I read it."},
                {"type": "tool_use", "name": "read", "input": {"path": "a"}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "content": "text"}]},
        ]},
        [(R, "A file."), (R, "I read it."), (A, '{"name": "read", "arguments": {"path": "a"}}')],
    ),
    (
        {"conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {"at": 3}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ]},
        [(A, '{"name": "sky", "arguments": {"at": 3}}'), (A, "It rains.")],
    ),
]  # fmt: skip

SHELL = "(Open file: a.py)\n(Current directory: /repo)\nbash-$"
SWEAGENT = [
    (
        chat(f"Mend it.\n{SHELL}", "DISCUSSION\nFirst I list.\n```\nls -a\n```", SHELL),
        [(R, "First I list."), (A, "ls -a")],
    ),
    (
        chat(SHELL, "I edit it.\n```\nedit 1:2\nx = 1\n\ny = 2\nend_of_edit\n```\n"),
        [(R, "I edit it."), (A, "edit 1:2\nx = 1\n\ny = 2\nend_of_edit")],
    ),
    (
        chat(SHELL, "Run it.\n<command>\npython a.py\n</command>", SHELL, "No command here."),
        [(R, "Run it."), (A, "python a.py")],
    ),
    (chat(SHELL, "```bash\nsubmit\n```"), [(A, "submit")]),
    (
        chat(SHELL, "The print of `x` is wrong:\nsee line 3.\n\n```\nopen a.py 3\n```"),
        [(R, "The print of `x` is wrong:\nsee line 3."), (A, "open a.py 3")],
    ),
]

CASES = {
    "paper": PAPER,
    "react-hotpotqa": HOTPOTQA,
    "fireact": FIREACT,
    "react-webshop": WEBSHOP,
    "react-alfworld": ALFWORLD,
    "eto": ETO,
    "agenttuning": AGENTTUNING,
    "chat": CHAT,
    "sweagent": SWEAGENT,
}
