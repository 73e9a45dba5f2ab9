//! What there is to measure: every data set over every link, and how large a set is there.

use crate::bench::bytes::set::{Set, Size};
use crate::lab::link::Link;

/// Links by what they stand for; each direction has the rate and the loss, the round trip is split between them.
pub const LINKS: &[LinkCase] = &[
    link("800mbit", 800.0, 20, 0.1, 1),
    link("100mbit", 100.0, 80, 1.0, 8),
    link("3mbit", 3.0, 50, 0.0, 128),
    LinkCase {
        name: "none",
        link: Link::None,
        divisor: 1,
    },
];

/// A quick look divides every set by this once more.
const QUICK_DIVISOR: u64 = 8;

/// A link, and by how much data sets are smaller on it, so that a copy takes seconds everywhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkCase {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it gives.
    pub link: Link,
    divisor: u64,
}

const fn link(
    name: &'static str,
    rate_mbit: f64,
    round_trip_ms: u64,
    loss_percent: f64,
    divisor: u64,
) -> LinkCase {
    LinkCase {
        name,
        link: Link::shaped(rate_mbit, round_trip_ms, loss_percent),
        divisor,
    }
}

/// How much time there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoroughness {
    /// The sizes that bars are about.
    Full,
    /// An eighth of them.
    Quick,
}

/// One set over one link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Case {
    /// The set.
    pub set: Set,
    /// The link.
    pub link: LinkCase,
}

impl Case {
    /// Its name: `noise@800mbit`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}@{}", self.set.name(), self.link.name)
    }

    /// How large the set is on this link.
    #[must_use]
    pub fn size(&self, thoroughness: Thoroughness) -> Size {
        let quick = match thoroughness {
            Thoroughness::Full => 1,
            Thoroughness::Quick => QUICK_DIVISOR,
        };
        // Small files are about round trips: only a link that could not carry them in time gets fewer.
        let files = if self.link.divisor > 100 {
            self.link.divisor
        } else {
            1
        };
        self.set.size(self.link.divisor * quick, files * quick)
    }
}

/// What was asked for on the command line; each filter is a part of a name, an empty list means all.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    /// Parts of names of cases.
    pub cases: Vec<String>,
    /// Parts of names of sets.
    pub sets: Vec<String>,
    /// Parts of names of links.
    pub links: Vec<String>,
}

/// The cases that fit, link by link, so that each link is built once.
///
/// # Errors
/// The filters, when nothing fits them all.
pub fn chosen(filters: &Filters) -> Result<Vec<Case>, String> {
    let fits = |filters: &[String], name: &str| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    };
    let mut cases = Vec::new();
    for link in LINKS.iter().filter(|link| fits(&filters.links, link.name)) {
        for set in Set::ALL {
            let case = Case { set, link: *link };
            if fits(&filters.sets, set.name()) && fits(&filters.cases, &case.name()) {
                cases.push(case);
            }
        }
    }
    if cases.is_empty() {
        let all = [&filters.cases, &filters.sets, &filters.links];
        let words: Vec<&str> = all.into_iter().flatten().map(String::as_str).collect();
        return Err(words.join(" and "));
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(cases: &[&str], sets: &[&str], links: &[&str]) -> Vec<String> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let filters = Filters {
            cases: owned(cases),
            sets: owned(sets),
            links: owned(links),
        };
        chosen(&filters).unwrap().iter().map(Case::name).collect()
    }

    #[test]
    fn filters_of_one_kind_add_up_and_those_of_different_kinds_narrow_down() {
        assert_eq!(
            names(&[], &["noise", "text"], &["3mbit"]),
            ["noise@3mbit", "text@3mbit"]
        );
        assert_eq!(
            names(&["small-files@100"], &[], &[]),
            ["small-files@100mbit"]
        );
        assert_eq!(names(&[], &[], &[]).len(), LINKS.len() * Set::ALL.len());
    }

    #[test]
    fn a_filter_that_fits_nothing_is_named() {
        let filters = Filters {
            sets: vec!["video".to_owned()],
            ..Filters::default()
        };
        assert_eq!(chosen(&filters).unwrap_err(), "video");
    }

    #[test]
    fn small_files_are_as_many_over_a_long_round_trip_as_over_a_short_one() {
        let cases = chosen(&Filters::default()).unwrap();
        let files = |link: &str| {
            let case = cases
                .iter()
                .find(|case| case.set == Set::SmallFiles && case.link.name == link);
            case.unwrap().size(Thoroughness::Full).files
        };
        assert_eq!(files("800mbit"), 100_000);
        assert_eq!(files("100mbit"), 100_000);
        assert!(files("3mbit") < 1000);
    }
}
