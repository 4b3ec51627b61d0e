"""The rows of tools/fold.py --csv, and their means over seeds."""

import pytest
import torch

from dn_mmdet.deploy import trade_off
from dn_mmdet.tables import csv_text


def row(
    seed=0,
    dynamic=4,
    value=0.5,
    took=2.0,
    config='dnb',
    changed=None,
    value_changed=None,
    weights='0123abcd',
):
    return dict(
        zip(
            trade_off.COLUMNS + trade_off.EXTRA,
            (
                'digits',
                config,
                seed,
                changed,
                4,
                dynamic,
                'mAP',
                value,
                'no',
                value_changed,
                10,
                20,
                took,
                512,
                'CPU',
                'c0ffee',
                weights,
            ),
            strict=True,
        )
    )


def test_the_table_of_a_model_replaces_that_of_the_same_one(tmp_path):
    path = tmp_path / 'folding.csv'
    first = [row(), row(dynamic=1), row(dynamic=0)]
    trade_off.merge(path, first)
    assert trade_off.read(path) == first
    others = [row(seed=1), row(config='dnc'), row(changed='std=2', value_changed=0.1)]
    for other in others:
        trade_off.merge(path, [other])
    again = [row(value=0.7), row(dynamic=0)]
    trade_off.merge(path, again)
    assert trade_off.read(path) == [*others, *again]


def test_a_curve_is_the_mean_of_seeds_and_its_ratios_are_taken_within_each():
    rows = [
        row(0, 4, 0.50, 2.0),
        row(0, 1, 0.49, 1.5),
        row(0, 0, 0.40, 1.0),
        row(1, 4, 0.60, 6.0),
        row(1, 0, 0.54, 2.0),
    ]
    whole, folded = trade_off.curve(rows)  # one seed alone has 1 dynamic layer
    assert (whole['dynamic'], whole['seeds'], folded['dynamic']) == (4, 2, 0)
    assert (whole['value'], folded['value']) == pytest.approx((0.55, 0.47))
    assert (whole['to_dynamic'], folded['to_dynamic']) == pytest.approx((0, -0.08))
    assert (whole['time'], folded['time']) == pytest.approx((2.5, 1))
    assert whole['value_changed'] is None
    changed = trade_off.curve([row(value_changed=0.2), row(1, value_changed=0.3)])
    assert changed[0]['value_changed'] == pytest.approx(0.25)


def test_the_figure_has_a_panel_for_each_config(tmp_path):
    plt = pytest.importorskip('matplotlib.pyplot', reason='draws')
    trade_off.merge(tmp_path / 'rows.csv', [row(), row(dynamic=0, value=0.2)])
    trade_off.draw(tmp_path / 'rows.csv', tmp_path / 'one.png')
    trade_off.merge(
        tmp_path / 'rows.csv',
        [
            row(config='dnc'),
            row(config='dnc', dynamic=0),
            row(config='c'),
            row(config='c', dynamic=0),
        ],
    )
    trade_off.draw(tmp_path / 'rows.csv', tmp_path / 'three.png')
    one, three = (plt.imread(tmp_path / f'{name}.png') for name in ('one', 'three'))
    assert three.shape[1] > 1.9 * one.shape[1] and one[..., :3].std() > 0.01


def test_another_checkpoint_of_the_same_run_is_another_model(tmp_path):
    path = tmp_path / 'folding.csv'
    early = [row(weights='aaaaaaaa', value=0.3), row(weights='aaaaaaaa', dynamic=0, value=0.2)]
    late = [row(weights='bbbbbbbb', value=0.5), row(weights='bbbbbbbb', dynamic=0, value=0.1)]
    trade_off.merge(path, early)
    trade_off.merge(path, late)
    assert trade_off.read(path) == [*early, *late]
    (points,) = trade_off.curves(path).values()  # of a seed, the last
    assert [(point['seeds'], point['value']) for point in points] == [(1, 0.5), (1, 0.1)]


def test_rows_of_an_earlier_file_do_not_say_which_weights_they_are_of(tmp_path):
    path = tmp_path / 'folding.csv'
    old = [{key: value for key, value in row().items() if key != 'weights'}, row(seed=1)]
    path.write_text(csv_text(old, trade_off.COLUMNS))
    trade_off.merge(path, [row(value=0.7)])
    assert [(r['seed'], r['value'], r['weights']) for r in trade_off.read(path)] == [
        (1, 0.5, None),
        (0, 0.7, '0123abcd'),
    ]


def test_the_digest_is_of_the_weights():
    state = dict(a=torch.ones(2, 3), b=torch.zeros((), dtype=torch.int64))
    digest = trade_off.digest_of(dict(state_dict=state, meta=dict(epoch=3)))
    assert len(digest) == 8 and digest == trade_off.digest_of(dict(state_dict=dict(state)))
    assert digest == trade_off.digest_of({f'module.{key}': t for key, t in state.items()})
    changed = dict(state, a=state['a'].index_fill(0, torch.tensor([1]), 2))
    for other in (changed, dict(c=state['a'], b=state['b'])):
        assert trade_off.digest_of(dict(state_dict=other)) != digest
