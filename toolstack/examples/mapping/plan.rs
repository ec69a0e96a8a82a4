//! What one run is to do.

use std::fs;
use std::path::PathBuf;

use rxl_migrate::frame::DomId;
use rxl_toolstack::xc::MapperWanted;

use crate::Result;

/// Who maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// Threads of one process.
    Thread,
    /// Threads of one process, by rxl's kernel module; all others map by privcmd.
    Module,
    /// Processes, each with an address space of its own.
    Process,
    /// Processes that map everything before the measured time, and unmap after it.
    Keep,
    /// Processes that never unmap, but end.
    Exit,
}

/// What is done with what is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing.
    Map,
    /// Every page is copied.
    Copy,
}

/// The words of a run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) domid: DomId,
    pub(crate) frames_file: PathBuf,
    pub(crate) backend: Backend,
    pub(crate) workers: usize,
    pub(crate) work: Work,
    pub(crate) batch_pages: usize,
    pub(crate) passes: u64,
}

impl Plan {
    pub(crate) fn parse(words: &[&str]) -> Result<Plan> {
        let [domid, frames_file, backend, workers, work, batch_pages, passes] = words else {
            return Err("a run has DOMID FILE BACKEND WORKERS WORK BATCH PASSES".into());
        };
        Ok(Plan {
            domid: DomId(domid.parse()?),
            frames_file: frames_file.into(),
            backend: Backend::parse(backend)?,
            workers: workers.parse()?,
            work: match *work {
                "map" => Work::Map,
                "copy" => Work::Copy,
                _ => return Err("work is map or copy".into()),
            },
            batch_pages: batch_pages.parse::<usize>()?.max(1),
            passes: passes.parse()?,
        })
    }

    /// The inverse of [`Plan::parse`].
    pub(crate) fn words(&self) -> Vec<String> {
        vec![
            self.domid.0.to_string(),
            self.frames_file.display().to_string(),
            self.backend.word().to_owned(),
            self.workers.to_string(),
            if self.work == Work::Map { "map" } else { "copy" }.to_owned(),
            self.batch_pages.to_string(),
            self.passes.to_string(),
        ]
    }

    /// What maps.
    pub(crate) fn mapper(&self) -> MapperWanted {
        match self.backend {
            Backend::Module => MapperWanted::Module,
            _ => MapperWanted::Privcmd,
        }
    }

    /// The domain's frames.
    pub(crate) fn frames(&self) -> Result<Vec<u64>> {
        let bytes = fs::read(&self.frames_file)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Their number.
    pub(crate) fn pages(&self) -> Result<u64> {
        Ok(fs::metadata(&self.frames_file)?.len() / 8)
    }
}

impl Backend {
    fn parse(word: &str) -> Result<Backend> {
        let all =
            [Backend::Thread, Backend::Module, Backend::Process, Backend::Keep, Backend::Exit];
        let found = all.into_iter().find(|backend| backend.word() == word);
        found.ok_or_else(|| "a backend is thread, module, process, keep or exit".into())
    }

    fn word(self) -> &'static str {
        match self {
            Backend::Thread => "thread",
            Backend::Module => "module",
            Backend::Process => "process",
            Backend::Keep => "keep",
            Backend::Exit => "exit",
        }
    }
}
