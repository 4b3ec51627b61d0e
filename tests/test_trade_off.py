"""The rows of tools/fold.py --csv, and their means over seeds."""

import pytest

from dn_mmdet.deploy import trade_off


def row(seed=0, dynamic=4, value=0.5, took=2.0, config='dnb', changed=None, value_changed=None):
    return dict(
        zip(
            trade_off.COLUMNS,
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
