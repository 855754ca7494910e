"""The model's notes of flows that outsiders opened to pods' own addresses."""

from __future__ import annotations

from dataclasses import dataclass, field

from .nat_words import TCP, Flow, Lifetimes, Message, Note, State


@dataclass
class Notes:
    """All of them, by the flow as the pod's answers show it. Times are in seconds."""

    lifetimes: Lifetimes
    inbound: dict[Flow, Note] = field(default_factory=dict)
    """Of what was not answered, or did not go on."""
    conversations: dict[Flow, int] = field(default_factory=dict)
    """Of the rest: when last seen."""

    def take(self, message: Message, answer: Flow, now: int, *, is_pods: bool) -> None:
        """Note what an outsider has sent; `is_pods`: in a flow that the pod has opened."""
        note = self.inbound.get(answer)
        if answer in self.conversations:
            self.conversations[answer] = now
        elif note and note.answered and message.carries_on:
            del self.inbound[answer]
            self.conversations[answer] = now
        elif note:
            note.seen = now
        elif not message.about and not is_pods:
            self.inbound[answer] = Note(now)

    def allow(self, message: Message, flow: Flow, now: int, *, is_pods: bool) -> bool:
        """Say whether a pod's packet answers an outsider: if there is a note that counts.

        It is not old (of TCP, the SYN tells), the flow is not one that the pod has opened, nor another pod's.
        """
        note = None if flow in self.conversations else self.inbound.get(flow)
        seen = note.seen if note else self.conversations.get(flow)
        if note and message.carries_on:
            note.answered = True
        if seen is None or message.opens or is_pods or flow.source != message.source:
            return False
        if flow.protocol != TCP and now - seen >= self.lifetimes.of(flow.protocol, State.NEW):
            return False
        if note:
            note.seen = now
        else:
            self.conversations[flow] = now
        return True

    def forget(self, flow: Flow) -> None:
        """Forget a flow: the pod has opened it itself."""
        self.inbound.pop(flow, None)
        self.conversations.pop(flow, None)
