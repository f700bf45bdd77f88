"""Recurrences: hidden units that gates, layers, directions and states share."""

from __future__ import annotations

import torch
from torch import nn

from .case import Head, case


@case(
    (2, 5, 9), conv__weight=(5, 5, 3), lstm__weight_ih_l0=(16, 5), lstm__weight_hh_l0_reverse=(16, 4),
    lstm__weight_ih_l1=(16, 8), lstm__bias_hh_l1_reverse=(16,), fc__weight=(3, 8),
)  # fmt: skip
class StackedLstm(nn.Module):
    """Two layers in both directions: 4 gates of 7 hidden units, and the second layer reads 2 times as many."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(5, 10, 3)
        self.lstm = nn.LSTM(10, 7, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(14, 3)

    def forward(self, x):
        return self.fc(self.lstm(self.conv(x).transpose(1, 2))[0])


@case((2, 5, 9), conv__weight=(5, 5, 3), gru__weight_ih_l0=(12, 5), gru__weight_hh_l0=(12, 4), head__fc__weight=(3, 4))
class GruWithStates(nn.Module):
    """Steps first; the first state is stored, and the last one multiplies every step."""

    def __init__(self):
        super().__init__()
        self.conv, self.gru, self.head = nn.Conv1d(5, 10, 3), nn.GRU(10, 7), Head(7)
        self.register_buffer("start", torch.randn(1, 1, 7))

    def forward(self, x):
        steps, last = self.gru(self.conv(x).permute(2, 0, 1), self.start.expand(-1, x.shape[0], -1))
        return self.head((steps * last).permute(1, 2, 0))


@case(
    (2, 4, 3), first__weight_ih=(16, 4), second__weight_ih=(4, 4), second__weight_hh=(4, 4), third__weight_ih=(9, 4),
    fc__weight=(3, 3),
)  # fmt: skip
class UnrolledCells(nn.Module):
    """Cells step by step: an LSTM with states of its own, an RNN with those of zeros, and a GRU."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(4, 8), nn.RNNCell(8, 8, bias=False), nn.GRUCell(8, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        states, last = None, None
        for step in x.unbind(2):
            states = self.first(step, states)
            last = self.third(self.second(states[0]), last)
        return self.fc(last)


@case((2, 5, 10), rnn__weight_ih_l0=(4, 10), rnn__weight_ih_l2=(4, 4), rnn__weight_hh_l2=(4, 4), fc__weight=(3, 4))
class RectifiedRnn(nn.Module):
    """Three layers without biases or gates, that keep their hidden units at or above 0."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.RNN(10, 7, 3, nonlinearity="relu", bias=False, batch_first=True), nn.Linear(7, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])
