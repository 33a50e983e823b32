-- Put actual amounts in the place of held ones, and debit what no hold stands for any more.

-- Change a bucket's arrival at `pin` from `held` to `actual` units. What has drained since is not given back, else a
-- bucket could be drained twice as fast as its rate.
local function correct(cell, c, held, actual)
  local at, backlog = drained(cell, c.limit)
  if actual > held then
    backlog = backlog + (actual - held) * c.p1
  else
    local refund = (held - actual) * c.p1
    local left = held * c.p1 - (at - c.pin) * c.limit
    if left < refund then refund = left end
    if refund > 0 then backlog = backlog > refund and backlog - refund or 0 end
  end
  fill(cell, c.limit, at, backlog)
end

-- Add `amount` to what is used in the window that `c` is pinned to; `make` the window if the store has lost it.
local function debit(c, amount, make)
  local kind, pin = c.kind, c.pin
  local cell = cells[c.name]
  if kind == BUCKET then
    if not cell then
      cell = {0, 0, now, now, nil, 2, BUCKET}
      cells[c.name] = cell
    end
    cell[7] = BUCKET
    local at, backlog = drained(cell, c.limit)
    fill(cell, c.limit, at, backlog + amount * c.p1)
  elseif kind == SLIDING then
    if not (cell and change_part(cell, pin, 0, 0)) then
      local newest = cell and cell[3] or 0
      local current = (now - fmod(now, c.p1)) / c.p1
      if not make or pin < (newest > current and newest or current) - c.p2 then return end
      if not cell then
        cell = {0, 0, 0, 0, '', 2}
        cells[c.name] = cell
      end
      insert_part(cell, pin)
      forget_parts(cell, newest > pin and newest or pin, c.p1, c.p2)
      cell[6] = 2
    end
    change_part(cell, pin, amount, 0)
    cell[6], cell[7] = cell[6] or 1, SLIDING
  else
    local running = c.resets and now < c.resets
    if make and running and (not cell or now >= cell[4]) then
      cell = {0, 0, pin, c.resets, nil, 2}
      cells[c.name] = cell
    end
    if cell and (cell[3] == pin or (make and running)) then
      cell[1] = cell[1] + amount
      if cell[1] > MAX then cell[1] = MAX end
      cell[6], cell[7] = cell[6] or 1, kind
    end
  end
end

-- `actuals`: for each claim the amount, or nil for what is held; `nothing`: 0 for all of them.
local function release(claims, actuals, nothing)
  local overages, over = {}, false
  for i = 1, #claims do
    local c = claims[i]
    local kind, held, actual, overage = c.kind, c.amount, 0, 0
    if not nothing then actual = actuals[i] or held end
    if c.taken == 1 and kind ~= DISTINCT then
      local cell = cells[c.name]
      if kind ~= SLOTS and actual > held then overage, over = actual - held, true end
      if kind <= CALENDAR then
        if cell and cell[3] == c.pin then
          cell[2] = cell[2] - held
          cell[1] = cell[1] + actual
          if cell[1] > MAX then cell[1] = MAX end
          cell[6], cell[7] = cell[6] or 1, kind
        end
      elseif not cell then
        if kind == BUCKET and overage > 0 then debit(c, overage, true) end
      elseif kind == SLIDING then
        if change_part(cell, c.pin, actual, -held) then cell[6], cell[7] = cell[6] or 1, kind end
      else
        cell[2] = cell[2] - held
        cell[6], cell[7] = cell[6] or 1, kind
        if kind == BUCKET and actual ~= held then correct(cell, c, held, actual) end
      end
    end
    overages[i] = overage
  end
  return overages, over
end

-- `late`: what is above the amount that expiry has charged. Else (the store lost the hold): the whole.
local function charge(claims, actuals, nothing, late)
  local overages, over = {}, false
  for i = 1, #claims do
    local c = claims[i]
    local held, actual, overage = c.amount, 0, 0
    if not nothing then actual = actuals[i] or held end
    if c.taken == 1 and c.kind < SLOTS then
      if actual > held then overage, over = actual - held, true end
      local amount = actual
      if late and not flag(c.flags, 2) then amount = overage end
      if amount > 0 then debit(c, amount, not late) end
    end
    overages[i] = overage
  end
  return overages, over
end

-- Add amounts to what is used now, past the limits too. `bounds`: start and end of calendar windows.
local function debit_current(claims)
  for i = 1, #claims do
    local c = claims[i]
    local cell = cells[c.name]
    if c.amount > 0 and c.kind < SLOTS then
      if c.kind == BUCKET then
        debit(c, c.amount, true)
      elseif c.kind == SLIDING then
        c.pin = (now - fmod(now, c.p1)) / c.p1
        if cell and cell[3] > c.pin then c.pin = cell[3] end
        debit(c, c.amount, true)
      else
        if not cell or now >= cell[4] then
          if c.kind == CALENDAR then
            cell = {0, 0, c.start, c.finish, nil, 2}
          else
            cell = {0, 0, now, now + c.p1, nil, 2}
          end
          cells[c.name] = cell
        end
        cell[1] = cell[1] + c.amount
        if cell[1] > MAX then cell[1] = MAX end
        if c.kind == LIFETIME and flag(c.flags, 4) and cell[4] < now + c.p1 then cell[4], cell[6] = now + c.p1, 2 end
        cell[6], cell[7] = cell[6] or 1, c.kind
      end
    end
  end
end
