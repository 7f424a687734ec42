// Roles on what stands behind the workspace, each on one resource and never on the group.
param storageName string
param vaultName string
param registryName string
param insightsName string
param workspacePrincipalId string
param computePrincipalId string
param endpointPrincipalId string
param workflowPrincipalId string
param withWorkflow bool
param people array

var role = {
  contributor: 'b24988ac-6180-42a0-ab88-20f7382dd24c'
  blobContributor: 'ba92f5b4-2d11-453d-a403-e96b0029c9fe'
  blobReader: '2a2b9908-6ea1-4ae2-8e65-a410df84e7d1'
  fileContributor: '69566ab7-960f-475b-8e7c-b3118f30c6bd'
  vaultAdministrator: '00482a5a-887f-4fb3-b363-3b7fe8e74483'
  pull: '7f951dda-4ed3-4680-a7ca-43fe172d538d'
  push: '8311e382-0749-4cb8-b61a-304f252e45ec'
}

resource storage 'Microsoft.Storage/storageAccounts@2023-05-01' existing = {
  name: storageName
}

resource vault 'Microsoft.KeyVault/vaults@2023-07-01' existing = {
  name: vaultName
}

resource registry 'Microsoft.ContainerRegistry/registries@2023-07-01' existing = {
  name: registryName
}

resource insights 'Microsoft.Insights/components@2020-02-02' existing = {
  name: insightsName
}

// What the service documents for a workspace with an identity of its own: contributor of its four parts (it approves
// the managed network's private endpoints), and the data in two of them.
resource workspaceStorage 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for id in [
  role.contributor
  role.blobContributor
  role.fileContributor
]: {
  scope: storage
  name: guid(storage.id, workspacePrincipalId, id)
  properties: {
    principalId: workspacePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', id)
  }
}]

resource workspaceVault 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for id in [
  role.contributor
  role.vaultAdministrator
]: {
  scope: vault
  name: guid(vault.id, workspacePrincipalId, id)
  properties: {
    principalId: workspacePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', id)
  }
}]

resource workspaceRegistry 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: registry
  name: guid(registry.id, workspacePrincipalId, role.contributor)
  properties: {
    principalId: workspacePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.contributor)
  }
}

resource workspaceInsights 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: insights
  name: guid(insights.id, workspacePrincipalId, role.contributor)
  properties: {
    principalId: workspacePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.contributor)
  }
}

// Nodes read code and data, write results, and pull their image.
resource computeStorage 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: storage
  name: guid(storage.id, computePrincipalId, role.blobContributor)
  properties: {
    principalId: computePrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.blobContributor)
  }
}

// An endpoint reads its model and pulls its image.
resource endpointStorage 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: storage
  name: guid(storage.id, endpointPrincipalId, role.blobReader)
  properties: {
    principalId: endpointPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.blobReader)
  }
}

resource pulls 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for principalId in [
  computePrincipalId
  endpointPrincipalId
]: {
  scope: registry
  name: guid(registry.id, principalId, role.pull)
  properties: {
    principalId: principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.pull)
  }
}]

// The workflow pushes images and uploads the code of the jobs that it starts.
resource workflowRegistry 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (withWorkflow) {
  scope: registry
  name: guid(registry.id, 'workflow', role.push)
  properties: {
    principalId: workflowPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.push)
  }
}

resource workflowStorage 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (withWorkflow) {
  scope: storage
  name: guid(storage.id, 'workflow', role.blobContributor)
  properties: {
    principalId: workflowPrincipalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.blobContributor)
  }
}

resource peopleStorage 'Microsoft.Authorization/roleAssignments@2022-04-01' = [for person in people: {
  scope: storage
  name: guid(storage.id, person, role.blobContributor)
  properties: {
    principalId: person
    principalType: 'User'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', role.blobContributor)
  }
}]
