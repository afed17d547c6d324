//! A bar chart of each work: a bar a side, with the extremes of its rounds.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::results::WorkResults;
use super::side::Side;
use super::statistics::Spread;

const SIZE: (u32, u32) = (640, 260);
/// Above the highest bar.
const HEADROOM: f64 = 1.15;

/// SVG, or nothing where there is nothing to draw.
pub fn of_work(work: &WorkResults) -> Result<Option<String>> {
    let figure = work.compared();
    let bars: Vec<(Side, Spread)> =
        work.sides.iter().filter_map(|(side, outcome)| Some((*side, outcome.spread(figure)?))).collect();
    let highest = bars.iter().map(|(_, spread)| spread.max).fold(0.0, f64::max);
    if highest <= 0.0 {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, figure.label(), &bars, highest * HEADROOM)
        .map_err(|error| anyhow!("drawing {}: {error}", work.key))?;
    Ok(Some(svg))
}

fn draw(
    svg: &mut String,
    label: &str,
    bars: &[(Side, Spread)],
    top: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let count = bars.len();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(28)
        .y_label_area_size(72)
        // A range of segments includes its end.
        .build_cartesian_2d((0..count - 1).into_segmented(), 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .y_label_formatter(&|value| if top < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") })
        .x_labels(count)
        .x_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(index) => {
                bars.get(*index).map_or(String::new(), |(side, _)| side.as_str().into())
            }
            _ => String::new(),
        })
        .y_desc(label)
        .draw()?;
    chart.draw_series(bars.iter().enumerate().map(|(index, (side, spread))| {
        let corners = [(SegmentValue::Exact(index), 0.0), (SegmentValue::Exact(index + 1), spread.median)];
        let mut bar = Rectangle::new(corners, colour(*side).filled());
        bar.set_margin(0, 0, 12, 12);
        bar
    }))?;
    chart.draw_series(bars.iter().enumerate().map(|(index, (_, spread))| {
        let (min, median, max) = (spread.min, spread.median, spread.max);
        ErrorBar::new_vertical(SegmentValue::CenterOf(index), min, median, max, BLACK.filled(), 10)
    }))?;
    root.present()?;
    Ok(())
}

fn colour(side: Side) -> RGBColor {
    match side {
        Side::Direct => RGBColor(0x88, 0x88, 0x88),
        Side::Sockmap => RGBColor(0x1b, 0x7f, 0x5c),
        Side::Peek => RGBColor(0x5b, 0xb5, 0x8f),
        _ => RGBColor(0xc9, 0xa2, 0x5e),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::figure::Figure;
    use super::super::results::Outcome;
    use super::*;

    fn work(sides: &[(Side, f64)]) -> WorkResults {
        let outcome = |value: f64| Outcome {
            rounds: vec![BTreeMap::from([(Figure::RequestsPerSecond, value)])],
            trouble: None,
        };
        let sides = sides.iter().map(|(side, value)| (*side, outcome(*value))).collect();
        WorkResults { key: "x".into(), title: "X".into(), sides }
    }

    #[test]
    fn every_side_has_its_bar_and_its_name() {
        let svg = of_work(&work(&[(Side::Direct, 100.0), (Side::Sockmap, 90.0)])).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("direct") && svg.contains("sockmap") && svg.contains("requests/s"), "{svg}");
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        assert_eq!(of_work(&work(&[])).unwrap(), None);
    }
}
