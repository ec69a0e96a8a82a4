//! What rxl tells the user to do where it could not know how a migration ended, done word by word.

use anyhow::{Context, Result, ensure};
use rxl_lab::Host;

use super::aftermath::{Copy, copies_on};
use crate::tally::note;

/// The instructions, as they are printed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Instructions {
    /// Whom to look for at the target.
    look: String,
    /// If it runs there: for the source.
    destroy_here: String,
    /// If not: what to destroy at the target.
    left_there: Vec<String>,
    /// After that: for the source.
    resume_here: String,
}

impl Instructions {
    /// Finds them in what was printed.
    pub(super) fn find(said: &str) -> Result<Instructions> {
        let after = |words: &str| {
            let rest = said.split_once(words).map(|(_, rest)| rest);
            let line = rest.and_then(|rest| rest.lines().next());
            line.with_context(|| format!("nothing says {words:?}: {said}"))
        };
        let look = after("Look there: xl list ")?.trim();
        let destroy = after("if it is there and runs, destroy the copy here: ")?.trim();
        let rest = after("if not, destroy there what is left of it (")?;
        let (left, resume) =
            rest.split_once("), then here: ").context("nothing says what to resume")?;
        Ok(Instructions {
            look: look.to_owned(),
            destroy_here: destroy.to_owned(),
            left_there: left.split(" or ").map(str::to_owned).collect(),
            resume_here: resume.trim().to_owned(),
        })
    }

    /// Does what they say.
    pub(super) fn follow(&self, source: &Host, target: &Host) -> Result<()> {
        let there = copies_on(target, &self.look)?;
        let runs = |copy: &Copy| copy.name == self.look && copy.runs();
        if there.iter().any(runs) {
            note(format!("it runs there; here: {}", self.destroy_here));
            return source.run(&self.destroy_here).map(drop);
        }
        for copy in there.iter().filter(|copy| self.left_there.contains(&copy.name)) {
            note(format!("it does not run there; there: xl destroy {}", copy.name));
            target.run(&format!("xl destroy {}", copy.name))?;
        }
        let left = copies_on(target, &self.look)?;
        ensure!(left.is_empty(), "still at the target: {left:?}");
        note(format!("here: {}", self.resume_here));
        source.run(&self.resume_here).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_read_as_they_are_printed() {
        let said = "rxl: the target did not report\n\
            rxl: web stays suspended here as web--away, because it may run on host2.\n\
            rxl: Look there: xl list web\n\
            rxl: - if it is there and runs, destroy the copy here: xl destroy web--away\n\
            rxl: - if not, destroy there what is left of it (web or web--incoming), then here: \
            rxl resume web--away\n";
        let found = Instructions::find(said).unwrap();
        assert_eq!(found.look, "web");
        assert_eq!(found.destroy_here, "xl destroy web--away");
        assert_eq!(found.left_there, ["web", "web--incoming"]);
        assert_eq!(found.resume_here, "rxl resume web--away");
        assert!(Instructions::find("rxl: web keeps running here.").is_err());
    }
}
