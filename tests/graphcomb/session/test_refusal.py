"""What a session refuses, with the reason."""

import warnings

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import BadInput
from graphcomb.passes import Distill, Fuse, RemoveChannels

from .toys import CUTS, OPTIMIZERS, STEPS, Residual, attached, batch, train


class TestRefused:
    def test_what_cannot_be_attached(self):
        x = batch(0)[0]
        for arguments, says in (
            ({"pass_": Fuse()}, "Fuse does not train"),
            ({"pass_": "prune"}, "takes a pass"),
            ({"steps": 0}, "steps is how many"),
            ({"cut": "middle"}, '"end" or "during"'),
            ({"example": None}, "give example"),
            ({"colour": 1}, "colour"),
            ({"pass_": RemoveChannels(macs=0.5, round_to=1, train=Distill(features=1.0))}, "sees no features"),
        ):
            options = {"pass_": RemoveChannels(macs=0.5), "example": (x,), "steps": 3} | arguments
            with pytest.raises(BadInput, match=says):
                graphcomb.attach(Residual(), **options)
        with pytest.raises(BadInput, match="has no class to keep"):
            graphcomb.attach(graphcomb.capture(Residual(), (x,)), RemoveChannels(macs=0.5), steps=3)

    def test_steps_out_of_order(self):
        session = attached(Residual().train(), "end", steps=4)
        optimizer = OPTIMIZERS["sgd"](session.module.parameters())
        with pytest.raises(BadInput, match="call before_step"):
            session.after_step()
        train(session, optimizer, steps=1)
        with pytest.raises(
            BadInput, match="after 1 of 4 steps the pass has not done its work, which goes on until step 2"
        ):
            session.finish()
        train(session, optimizer, first=1, steps=4)
        with pytest.raises(BadInput, match="all 4 steps"):
            session.before_step(optimizer)
        session.finish()
        with pytest.raises(BadInput, match="over"):
            session.finish()

    def test_training_that_stops_early_is_no_mistake_once_all_is_cut(self):
        session = attached(Residual().train(), "end")
        train(session, OPTIMIZERS["sgd"](session.module.parameters()), steps=STEPS - 3)
        result = session.finish()
        assert result.record["steps"] == STEPS - 3

    @pytest.mark.parametrize("cut", CUTS)
    def test_an_optimizer_of_something_else(self, cut):
        session = attached(Residual().train(), cut)
        with pytest.raises(BadInput, match="holds no parameter of session"):
            session.before_step(OPTIMIZERS["sgd"](Residual().parameters()))

    @pytest.mark.parametrize("cut", CUTS)
    def test_gradients_that_are_gone_already(self, cut):
        session = attached(Residual().train(), cut)
        optimizer = OPTIMIZERS["sgd"](session.module.parameters())
        with pytest.raises(BadInput, match=r"no parameter of the optimizer has a gradient; call it after backward\(\)"):
            session.before_step(optimizer)

    @pytest.mark.parametrize("cut", CUTS)
    def test_weights_that_are_frozen_while_their_gradients_score(self, cut):
        """What the frozen weight reads would score 0 and be the first to go."""
        session = attached(Residual().train(), cut)
        optimizer = OPTIMIZERS["sgd"](session.module.parameters())
        train(session, optimizer, steps=1)
        session.module.get_parameter("blocks.1.b.weight").requires_grad_(False)
        with pytest.raises(BadInput, match=r"blocks\.1\.b\.weight was frozen during training"):
            train(session, optimizer, first=1)

    def test_weights_that_are_frozen_after_the_last_removal(self):
        session = attached(Residual().train(), "during")
        train(session, OPTIMIZERS["sgd"](session.module.parameters()), each=lambda step: self._freeze(session, step))
        assert session.finish().removed

    @staticmethod
    def _freeze(session, step):
        if session._work.callbacks[0].due(step + 1) is None:
            session.module.get_parameter("blocks.1.b.weight").requires_grad_(False)

    def test_an_optimizer_with_one_state_for_all_parameters(self):
        session = attached(Residual().train(), "during")
        with pytest.raises(BadInput, match="LBFGS keeps one flat state"):
            session.before_step(torch.optim.LBFGS(session.module.parameters()))

    def test_a_copy_of_something_else(self):
        session = attached(Residual().train(), "end")
        with pytest.raises(BadInput, match="has not the parameters"):
            session.follow(nn.Linear(2, 2))
        train(session, OPTIMIZERS["sgd"](session.module.parameters()))
        with pytest.raises(BadInput, match="no copy that the session follows"):
            session.finish(weights=nn.Linear(2, 2))

    def test_a_state_of_another_session(self):
        state = attached(Residual().train(), "end", steps=3).state_dict()
        with pytest.raises(BadInput, match="steps 3, not 12"):
            attached(Residual().train(), "end").load_state_dict(state)

    def test_weights_that_were_changed_behind_its_back(self):
        session = attached(Residual().train(), "end")
        train(session, OPTIMIZERS["sgd"](session.module.parameters()))
        with torch.no_grad():
            for p in session.module.parameters():
                p.add_(0.5)
        with pytest.raises(graphcomb.GraphcombError, match="differs from the module"):
            session.finish()

    def test_options_of_training_alone_need_it_where_there_is_no_loop(self):
        program = graphcomb.capture(Residual(), (batch(0)[0],))
        with warnings.catch_warnings(), pytest.raises(BadInput, match="interval: says how to prune while training"):
            RemoveChannels(macs=0.5, interval=2)(program)
