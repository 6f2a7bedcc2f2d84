//! Saving together: each rank writes its slices, the lead everything else and the manifest.

use std::fs;

use hexa_moe::MoeError;

use super::{Cuts, Ranks};
use crate::train::checkpoint::RunState;
use crate::train::checkpoint::files::{Seal, sync_directory, write_manifest, write_part};
use crate::train::error::{Result, TrainError};
use crate::train::params::HostTensors;
use crate::train::run_dir::RunDir;

/// What is saved of a rank.
#[derive(Debug)]
pub(in crate::train) struct Snapshot {
    /// Where the run stands.
    pub state: RunState,
    /// The rank's parameters.
    pub model: HostTensors,
    /// Their moments.
    pub optimizer: HostTensors,
}

impl Ranks {
    /// Saves a checkpoint; all ranks call it together. Until the last moment it has another name,
    /// so that a run that is killed leaves the earlier checkpoints, and nothing that looks like one.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be written; the earlier ones then stand.
    pub(in crate::train) fn save(
        &self,
        run: &RunDir,
        snapshot: &Snapshot,
        keep: usize,
        is_best: bool,
    ) -> Result<()> {
        let staging = run.staging();
        if self.is_lead() {
            if staging.exists() {
                fs::remove_dir_all(&staging).map_err(TrainError::io("remove", &staging))?;
            }
            fs::create_dir(&staging).map_err(TrainError::io("create the directory", &staging))?;
        }
        self.barrier("the checkpoint's directory is there")?;
        let (rank, _) = self.place();
        let none = Cuts::default();
        let cuts = self.0.as_ref().map_or(&none, |member| &member.cuts);
        let keeps = |name: &str| rank == 0 || cuts.contains(name);
        let (model, optimizer) = (&snapshot.model, &snapshot.optimizer);
        let seal = write_part(&staging, rank, model, optimizer, keeps)?;
        let seals = self.gather_seals(seal)?;
        if !self.is_lead() {
            return Ok(());
        }
        write_manifest(&staging, seals, cuts, &snapshot.state)?;
        let name = run.adopt(&staging, snapshot.state.step)?;
        sync_directory(&run.checkpoints())?;
        if is_best {
            run.set_best(&name)?;
        }
        run.drop_older(keep)
    }

    /// All ranks' seals, once all have written their files.
    fn gather_seals(&self, own: Seal) -> Result<Vec<Seal>> {
        let Some(member) = &self.0 else {
            return Ok(vec![own]);
        };
        let words = vec![(own.bytes >> 32) as u32, own.bytes as u32, own.crc32];
        let comm = member.context.comm();
        let all = comm.all_gather_u32("checksums", words);
        let seals = all.map_err(MoeError::from)?;
        Ok(seals
            .chunks_exact(3)
            .map(|words| Seal {
                bytes: u64::from(words[0]) << 32 | u64::from(words[1]),
                crc32: words[2],
            })
            .collect())
    }
}
