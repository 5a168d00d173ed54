//! Completion over time, as an SVG picture.

use std::fmt::Write as _;

use super::Outcome;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 48.0;

/// How many nodes had everything, over time; the bound as a dashed line.
pub fn completion(outcome: &Outcome, title: &str) -> String {
    let mut times: Vec<f64> = outcome
        .finishes
        .iter()
        .filter_map(|finish| finish.at_s)
        .collect();
    times.sort_by(f64::total_cmp);
    let end = times.last().copied().unwrap_or(0.0).max(outcome.bound_s) * 1.05;
    let x = |seconds: f64| MARGIN + (WIDTH - 2.0 * MARGIN) * seconds / end;
    let y = |part: f64| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * part;
    let mut line = format!("M{:.1} {:.1}", x(0.0), y(0.0));
    for (index, at) in times.iter().enumerate() {
        let part = |n: usize| y(n as f64 / outcome.finishes.len() as f64);
        let _ = write!(
            line,
            "L{:.1} {:.1}L{:.1} {:.1}",
            x(*at),
            part(index),
            x(*at),
            part(index + 1)
        );
    }
    let (bound, left, right) = (x(outcome.bound_s), x(0.0), WIDTH - MARGIN);
    let (top, bottom) = (y(1.0), y(0.0));
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' font-family='sans-serif' font-size='12'>\n\
         <rect width='100%' height='100%' fill='white'/>\n\
         <text x='{left}' y='24' font-size='14'>{title}</text>\n\
         <path d='M{left} {top}V{bottom}H{right}' fill='none' stroke='black'/>\n\
         <path d='M{bound:.1} {top}V{bottom}' stroke='gray' stroke-dasharray='4'/>\n\
         <text x='{bound:.1}' y='{:.1}' text-anchor='middle' fill='gray'>bound {:.2} s</text>\n\
         <text x='{:.1}' y='{:.1}'>100 %</text>\n\
         <text x='{right}' y='{:.1}' text-anchor='end'>{end:.1} s</text>\n\
         <path d='{line}' fill='none' stroke='steelblue' stroke-width='2'/>\n</svg>\n",
        top - 4.0,
        outcome.bound_s,
        4.0,
        top + 4.0,
        bottom + 16.0,
    )
}
